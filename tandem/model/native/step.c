// One decode step: every thread runs the whole step on its share of each product, and meets the others between them.
#include "model.h"

void norm_row(const float *x, vector weight, size_t first, float eps, size_t size, float *out) {
    vf squares = {0};
    for (size_t i = 0; i < size; i += VW) {
        vf v = vload_tail(F32, x, i, least(size - i, VW));
        squares = vfma(v, v, squares);
    }
    float scale = 1.0f / sqrtf(vsum(squares) / (float)size + eps);
    for (size_t i = 0; i < size; i += VW) {
        size_t n = least(size - i, VW);
        vstore_tail(out + i, vload_tail(F32, x, i, n) * scale * vload_tail(weight.type, weight.data, first + i, n), n);
    }
}

void norm_rows(lane *l, vector weight, float eps, size_t size) {
    const step *s = l->step;
    for (size_t i = 0; i < s->m && !pool_late(l->worker); i++) norm_row(s->hidden + i * s->ld_hidden, weight, 0, eps, size, l->x + i * l->ld_x);
}

inputs inputs_of(lane *l, const float *x, size_t ld, size_t k, const matrix *w) {
    inputs in = {x, ld, NULL, NULL};
    if (w->type != I8) return in;
    in.q = l->q;
    in.scale = l->q_scale;
    for (size_t i = 0; i < l->step->m && !pool_late(l->worker); i++) quantise_row(&in, i, k);
    return in;
}

// Bias and whatever follows, for outputs n0 to n1 of one row.
static void finish(const step *s, const product *p, size_t row, size_t n0, size_t n1, float *c, float *gate) {
    size_t count = n1 - n0;
    float *out = p->out + row * p->ld + n0;
    if (p->w->bias)
        for (size_t n = 0; n < count; n++) c[n] += load_as(p->w->bias_type, p->w->bias, n0 + n);
    switch (p->after) {
    case STORE:
        memcpy(out, c, count * sizeof(float));
        break;
    case ADD:
        for (size_t n = 0; n < count; n++) out[n] += c[n];
        break;
    case SQUARED_RELU:
        for (size_t n = 0; n < count; n++) out[n] = c[n] > 0 ? c[n] * c[n] : 0;
        break;
    case GATED:
        if (p->gate->bias)
            for (size_t n = 0; n < count; n++) gate[n] += load_as(p->gate->bias_type, p->gate->bias, n0 + n);
        for (size_t n = 0; n < count; n += VW) {
            vf v = vsilu(vload(gate + n)) * vload(c + n);
            vstore_tail(out + n, v, count - n < VW ? count - n : VW);
        }
        break;
    default:
        mamba_inputs(s, p, row, n0, n1, c);
    }
}

static size_t tasks_of(const product *p, size_t width) {
    return (p->m + M_BLOCK - 1) / M_BLOCK * (((size_t)p->w->rows + width - 1) / width);
}

void multiply(lane *l, const product *products, size_t count) {
    const step *s = l->step;
    size_t threads = (size_t)s->batch->threads, rows = 0, widest = s->m > 16 ? N_BLOCK : N_BLOCK / 2;
    for (size_t i = 0; i < count; i++) rows += (size_t)products[i].w->rows;
    size_t width = (rows / (threads * 8) + 15) / 16 * 16;
    width = width < 16 ? 16 : width > widest ? widest : width;
    size_t tasks = 0, begin = 0;
    for (size_t i = 0; i < count; i++) tasks += tasks_of(&products[i], width);
    const product *p = products;
    for (int64_t claimed; (claimed = pool_claim(l->worker, tasks)) != NO_TASK; pool_done(l->worker, tasks)) {
        size_t task = (size_t)claimed;
        for (; task >= begin + tasks_of(p, width); p++) begin += tasks_of(p, width);
        size_t m_blocks = (p->m + M_BLOCK - 1) / M_BLOCK, out = (size_t)p->w->rows;
        size_t m0 = (task - begin) % m_blocks * M_BLOCK, m = least(p->m - m0, M_BLOCK);
        size_t n0 = (task - begin) / m_blocks * width, n1 = least(n0 + width, out);
        inputs in = rows_from(&p->in, m0, (size_t)p->w->cols);
        gemm_block(p->w, &in, m, n0, n1, l->c, N_BLOCK, l->packed);
        if (p->after == GATED) gemm_block(p->gate, &in, m, n0, n1, l->c2, N_BLOCK, l->packed);
        for (size_t i = 0; i < m; i++) finish(s, p, m0 + i, n0, n1, l->c + i * N_BLOCK, l->c2 + i * N_BLOCK);
    }
    pool_next(l->worker);
}

void mlp_layer(lane *l, const layer *y) {
    const step *s = l->step;
    const matrix *up = &y->w[UP_PROJ], *gate = &y->w[GATE_PROJ], *down = &y->w[DOWN_PROJ];
    norm_rows(l, y->norm, y->eps, (size_t)up->cols);
    product first = {.w = up, .gate = gate, .m = s->m, .out = s->inner, .ld = s->ld_inner};
    first.in = inputs_of(l, l->x, l->ld_x, (size_t)up->cols, gate->data && gate->type == I8 ? gate : up);
    first.after = gate->data ? GATED : SQUARED_RELU;
    multiply(l, &first, 1);
    product last = {.w = down, .m = s->m, .out = s->hidden, .ld = s->ld_hidden, .after = ADD};
    last.in = inputs_of(l, s->inner, s->ld_inner, (size_t)down->cols, down);
    multiply(l, &last, 1);
}

static void begin(lane *l) {
    const step *s = l->step;
    const model *model = s->model;
    for (int64_t task; (task = pool_claim(l->worker, s->m)) != NO_TASK; pool_done(l->worker, s->m)) {
        size_t i = (size_t)task, hidden = (size_t)model->hidden, first = (size_t)s->batch->ids[i] * hidden;
        float *out = s->hidden + i * s->ld_hidden;
        for (size_t n = 0; n < hidden; n++) out[n] = load_as(model->embedding.type, model->embedding.data, first + n);
        for (int r = 0; r < model->num_ropes; r++) {
            float *cosines = s->turns + ((size_t)r * s->m + i) * 2 * s->max_pairs, *sines = cosines + s->max_pairs;
            for (int j = 0; j < model->ropes[r].pairs; j++) {
                float angle = (float)s->batch->lengths[i] * model->ropes[r].frequencies[j];
                cosines[j] = cosf(angle);
                sines[j] = sinf(angle);
            }
        }
    }
    pool_next(l->worker);
}

typedef struct {
    step step;
    size_t widest, quantised, scratch, top_k; // floats of the widest input, numbers of q, floats of scratch
} job;

static void *take(char **arena, size_t bytes) {
    void *p = *arena;
    *arena += (bytes + 63) / 64 * 64;
    return p;
}

// Lays out a thread's arena; returns its end.
static char *carve(lane *l, const job *j, char *arena) {
    size_t m = j->step.m;
    l->ld_x = padded(j->widest);
    l->x = take(&arena, m * l->ld_x * sizeof(float));
    l->q = take(&arena, j->quantised * sizeof(int16_t));
    l->q_scale = take(&arena, j->quantised / GROUP * sizeof(float));
    l->packed = take(&arena, PACKED_FLOATS * sizeof(float));
    l->c = take(&arena, (M_BLOCK * N_BLOCK + VW) * sizeof(float));
    l->c2 = take(&arena, (M_BLOCK * N_BLOCK + VW) * sizeof(float));
    l->scratch = take(&arena, j->scratch * sizeof(float));
    l->picks = take(&arena, m * j->top_k * sizeof(pick));
    l->gathered = take(&arena, m * j->top_k * l->ld_x * sizeof(float));
    return arena;
}

// Lays out what all threads share; returns its end.
static char *carve_shared(step *s, size_t top_k, size_t partial, char *arena) {
    s->hidden = take(&arena, s->m * s->ld_hidden * sizeof(float));
    s->wide = take(&arena, s->m * s->ld_wide * sizeof(float));
    s->inner = take(&arena, s->m * s->ld_inner * sizeof(float));
    s->partial = take(&arena, s->m * s->chunks * partial * sizeof(float));
    s->turns = take(&arena, (size_t)s->model->num_ropes * s->m * 2 * s->max_pairs * sizeof(float));
    s->pair_up = take(&arena, s->m * top_k * s->ld_up * sizeof(float));
    s->pair_down = take(&arena, s->m * top_k * s->ld_down * sizeof(float));
    return arena;
}

static void step_body(worker *self, void *argument) {
    const job *j = argument;
    const step *s = &j->step;
    lane l = {.step = s};
    l.worker = self;
    carve(&l, j, self->arena);
    begin(&l);
    for (int i = 0; i < s->model->num_layers; i++) {
        const layer *y = &s->model->layers[i];
        switch (y->kind) {
        case MAMBA: mamba_layer(&l, y, &s->batch->states[i]); break;
        case ATTENTION: attention_layer(&l, y, &s->batch->states[i]); break;
        case MLP: mlp_layer(&l, y); break;
        default: moe_layer(&l, y);
        }
    }
    const matrix *head = &s->model->head;
    norm_rows(&l, s->model->final_norm, s->model->eps, (size_t)s->model->hidden);
    product logits = {.w = head, .m = s->m, .out = s->batch->logits, .ld = (size_t)head->rows, .after = STORE};
    logits.in = inputs_of(&l, l.x, l.ld_x, (size_t)head->cols, head);
    multiply(&l, &logits, 1);
}

// Grows the sizes to what a layer needs; returns the numbers of its partial attention for one row and chunk.
static size_t fit(job *j, const layer *y) {
    step *s = &j->step;
    size_t heads = (size_t)y->heads, size = (size_t)y->head_dim, shared = heads / (size_t)most((size_t)y->groups, 1);
    size_t wide = 0, inner = 0, partial = 0;
    for (int i = 0; i < 7; i++) {
        const matrix *w = &y->w[i];
        if (!w->data) continue;
        j->widest = most(j->widest, (size_t)w->cols);
        if (w->type == I8) j->quantised = most(j->quantised, quantised(s->m, (size_t)w->cols));
    }
    switch (y->kind) {
    case MAMBA:
        wide = (size_t)y->w[IN_PROJ].rows;
        inner = heads * size;
        break;
    case ATTENTION:
        wide = (heads + 2 * (size_t)y->groups) * size;
        j->scratch = most(j->scratch, shared * (padded(size) + KV_CHUNK + 16) + padded(size));
        partial = heads * (size + 2);
        break;
    case MLP:
        inner = (size_t)y->w[UP_PROJ].rows;
        break;
    default:
        wide = (size_t)y->experts + (size_t)y->w[LATENT_IN].rows;
        inner = (size_t)y->w[SHARED_UP].rows;
        j->top_k = most(j->top_k, (size_t)y->top_k);
        j->scratch = most(j->scratch, ((size_t)y->experts + 1) * (2 + (sizeof(matrix) + sizeof(product)) / sizeof(float)));
        s->ld_up = most(s->ld_up, padded((size_t)y->w[EXPERT_UP].rows));
        s->ld_down = most(s->ld_down, padded((size_t)y->w[EXPERT_DOWN].rows));
    }
    s->ld_wide = most(s->ld_wide, padded(wide));
    s->ld_inner = most(s->ld_inner, padded(inner));
    return partial;
}

// Reads ids, changes the states in place, writes logits. Returns 0, or -1 without memory.
int tandem_decode_step(const model *m, const batch *b) {
    job j = {.step = {.model = m, .batch = b, .m = (size_t)b->rows, .chunks = 1}};
    step *s = &j.step;
    size_t partial = 0;
    j.widest = (size_t)m->hidden;
    if (m->head.type == I8) j.quantised = quantised(s->m, j.widest);
    s->ld_hidden = padded(j.widest);
    for (size_t i = 0; i < s->m; i++) s->chunks = most(s->chunks, (size_t)b->lengths[i] / KV_CHUNK + 1);
    for (int i = 0; i < m->num_ropes; i++) s->max_pairs = most(s->max_pairs, (size_t)m->ropes[i].pairs);
    for (int i = 0; i < m->num_layers; i++) partial = most(partial, fit(&j, &m->layers[i]));
    lane sizing = {.step = s};
    char *base = (char *)64; // an address to measure from; never read
    size_t arena = (size_t)(carve(&sizing, &j, base) - base), shared = (size_t)(carve_shared(s, j.top_k, partial, base) - base);
    pool_lock();
    char *memory = pool_shared(shared);
    int failed = memory == NULL;
    if (!failed) {
        carve_shared(s, j.top_k, partial, memory);
        failed = pool_run(b->threads, arena, step_body, &j);
    }
    pool_unlock();
    return failed ? -1 : 0;
}
