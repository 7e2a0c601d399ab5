// Grouped-query attention for one token of each row over keys and values in blocks. A task is one key-value head of one
// row over one chunk of tokens: the chunk that ends with the new token also stores it. Chunks are joined in order.
#include "model.h"

static void prepare(const step *s, const layer *y, vector norm, size_t row, const float *x, float *out) {
    size_t size = (size_t)y->head_dim;
    if (norm.data) norm_row(x, norm, 0, y->eps, size, out);
    else memcpy(out, x, size * sizeof(float));
    if (y->rope < 0) return;
    size_t pairs = (size_t)s->model->ropes[y->rope].pairs;
    const float *cosines = s->turns + ((size_t)y->rope * s->m + row) * 2 * s->max_pairs, *sines = cosines + s->max_pairs;
    for (size_t i = 0; i < pairs; i++) {
        float a = out[i], b = out[i + pairs];
        out[i] = a * cosines[i] - b * sines[i];
        out[i + pairs] = b * cosines[i] + a * sines[i];
    }
}

// Position of token t of a row's key-value head in the pool, in numbers.
INLINE size_t place(const batch *b, const layer *y, size_t row, size_t kv_head, size_t t) {
    size_t block = (size_t)b->blocks[row * (size_t)b->max_blocks + t / (size_t)b->block_size];
    return ((block * (size_t)y->groups + kv_head) * (size_t)b->block_size + t % (size_t)b->block_size) * (size_t)y->head_dim;
}

// out[d] += sum over `count` tokens of weight * value, token by token.
INLINE void weigh(const int type, const float *weights, const void *values, size_t first, size_t count, size_t size, float *out) {
    for (size_t d = 0; d < size;) {
        size_t left = size - d;
        if (left >= 4 * VW) {
            vf acc[4];
            UNROLL for (int j = 0; j < 4; j++) acc[j] = vload(out + d + j * VW);
            for (size_t t = 0; t < count; t++) {
                vf w = vset(weights[t]);
                UNROLL for (int j = 0; j < 4; j++)
                    acc[j] = vfma(w, vload_as(type, values, first + t * size + d + (size_t)j * VW), acc[j]);
            }
            UNROLL for (int j = 0; j < 4; j++) vstore(out + d + j * VW, acc[j]);
            d += 4 * VW;
        } else {
            size_t n = least(left, VW);
            vf acc = vload_tail(F32, out, d, n);
            for (size_t t = 0; t < count; t++) acc = vfma(vset(weights[t]), vload_tail(type, values, first + t * size + d, n), acc);
            vstore_tail(out + d, acc, n);
            d += n;
        }
    }
}

static void weigh_as(int type, const float *weights, const void *values, size_t first, size_t count, size_t size, float *out) {
    switch (type) {
    case F32: weigh(F32, weights, values, first, count, size, out); break;
    case F16: weigh(F16, weights, values, first, count, size, out); break;
    default: weigh(BF16, weights, values, first, count, size, out);
    }
}

// Scores of a chunk become exp(score - maximum); returns their sum and the maximum.
static void exponentials(float *scores, size_t count, float *sum, float *maximum) {
    float high = scores[0];
    for (size_t t = 1; t < count; t++) high = scores[t] > high ? scores[t] : high;
    vf total = {0};
    for (size_t t = 0; t < count; t += VW) {
        size_t n = least(count - t, VW);
        vf e = vexp(vload_tail(F32, scores, t, n) - high);
        vstore_tail(scores + t, e, n);
        total += vload_tail(F32, scores, t, n);
    }
    *sum = vsum(total);
    *maximum = high;
}

static void attend(lane *l, const layer *y, const layer_state *state, size_t row, size_t kv_head, size_t chunk) {
    const step *s = l->step;
    const batch *b = s->batch;
    const size_t size = (size_t)y->head_dim, shared = (size_t)(y->heads / y->groups), ld = padded(size), ld_scores = KV_CHUNK + 16;
    size_t now = (size_t)b->lengths[row], first = chunk * KV_CHUNK, end = least(now + 1, first + KV_CHUNK);
    float *q = l->scratch, *scores = q + shared * ld, *key = scores + shared * ld_scores;
    const float *projected = s->wide + row * s->ld_wide;
    for (size_t h = 0; h < shared; h++) {
        prepare(s, y, y->v[Q_NORM], row, projected + (kv_head * shared + h) * size, q + h * ld);
        for (size_t n = 0; n < size; n++) q[h * ld + n] *= 1.0f / sqrtf((float)size);
    }
    if (end == now + 1) {
        size_t to = place(b, y, row, kv_head, now);
        const float *keys = projected + (size_t)y->heads * size, *values = keys + (size_t)y->groups * size;
        prepare(s, y, y->v[K_NORM], row, keys + kv_head * size, key);
        for (size_t n = 0; n < size; n++) store_as(state->type, state->first, to + n, key[n]);
        for (size_t n = 0; n < size; n++) store_as(state->type, state->second, to + n, values[kv_head * size + n]);
    }
    size_t bytes = state->type == F32 ? 4 : 2, block_size = (size_t)b->block_size;
    for (size_t t = first, run; t < end; t += run) {
        run = least(end - t, block_size - t % block_size);
        matrix keys = {.data = (char *)state->first + place(b, y, row, kv_head, t) * bytes, .rows = (int64_t)run, .cols = (int64_t)size};
        keys.type = state->type;
        inputs in = {q, ld, NULL, NULL};
        gemm_block(&keys, &in, shared, 0, run, scores + (t - first), ld_scores, NULL);
    }
    float *out = s->partial + ((row * (size_t)y->heads + kv_head * shared) * s->chunks + chunk) * (size + 2);
    for (size_t h = 0; h < shared; h++, out += s->chunks * (size + 2)) {
        float *weights = scores + h * ld_scores;
        exponentials(weights, end - first, out, out + 1);
        memset(out + 2, 0, size * sizeof(float));
        for (size_t t = first, run; t < end; t += run) {
            run = least(end - t, block_size - t % block_size);
            weigh_as(state->type, weights + (t - first), state->second, place(b, y, row, kv_head, t), run, size, out + 2);
        }
    }
}

// The chunks of every row and head joined, into the thread's inputs.
static void join(lane *l, const layer *y) {
    const step *s = l->step;
    size_t size = (size_t)y->head_dim, heads = (size_t)y->heads, rows = pool_late(l->worker) ? 0 : s->m;
    for (size_t i = 0; i < rows * heads; i++) {
        size_t row = i / heads, chunks = (size_t)s->batch->lengths[row] / KV_CHUNK + 1;
        const float *part = s->partial + i * s->chunks * (size + 2);
        float *out = l->x + row * l->ld_x + i % heads * size, high = part[1], total = 0;
        for (size_t c = 1; c < chunks; c++) high = fmaxf(high, part[c * (size + 2) + 1]);
        memset(out, 0, size * sizeof(float));
        for (size_t c = 0; c < chunks; c++, part += size + 2) {
            float share = expf(part[1] - high);
            total += share * part[0];
            for (size_t n = 0; n < size; n++) out[n] += share * part[2 + n];
        }
        for (size_t n = 0; n < size; n++) out[n] /= total;
    }
}

void attention_layer(lane *l, const layer *y, const layer_state *state) {
    const step *s = l->step;
    const size_t width = (size_t)y->w[Q_PROJ].cols, queries = (size_t)(y->heads * y->head_dim);
    const size_t keys = (size_t)(y->groups * y->head_dim), kv_heads = (size_t)y->groups;
    size_t offsets[3] = {0, queries, queries + keys};
    product first[3];
    norm_rows(l, y->norm, y->eps, width);
    inputs in = {0};
    for (int i = 0; i < 3; i++)
        if (i == 0 || y->w[i].type == I8) in = inputs_of(l, l->x, l->ld_x, width, &y->w[i]);
    for (int i = 0; i < 3; i++)
        first[i] = (product){.w = &y->w[i], .in = in, .m = s->m, .out = s->wide + offsets[i], .ld = s->ld_wide, .after = STORE};
    multiply(l, first, 3);
    size_t tasks = s->m * kv_heads * s->chunks;
    for (int64_t task; (task = pool_claim(l->worker, tasks)) != NO_TASK; pool_done(l->worker, tasks)) {
        size_t chunk = (size_t)task % s->chunks, kv_head = (size_t)task / s->chunks % kv_heads, row = (size_t)task / s->chunks / kv_heads;
        if (chunk * KV_CHUNK <= (size_t)s->batch->lengths[row]) attend(l, y, state, row, kv_head, chunk);
    }
    pool_next(l->worker);
    join(l, y);
    product last = {.w = &y->w[O_PROJ], .m = s->m, .out = s->hidden, .ld = s->ld_hidden, .after = ADD};
    last.in = inputs_of(l, l->x, l->ld_x, queries, &y->w[O_PROJ]);
    multiply(l, &last, 1);
}
