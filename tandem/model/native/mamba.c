// A Mamba-2 layer for one token of each row. The in-projection's epilogue does what belongs to single channels: silu of
// the gate, convolution with silu and the shift of its window, softplus of the step. Then each head updates its state.
#include "model.h"

static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

static void silu(const float *x, size_t count, float *out) {
    for (size_t i = 0; i < count; i += VW) {
        size_t n = least(count - i, VW);
        vstore_tail(out + i, vsilu(vload_tail(F32, x, i, n)), n);
    }
}

// Convolves channels from to to with their new inputs and moves the window on; all in the given formats.
INLINE void convolve(const int type, const int state_type, const layer *y, void *window, size_t from, size_t to, const float *input,
                     float *out) {
    const size_t kernel = (size_t)y->kernel, kept = kernel - 1;
    const void *weight = y->v[CONV_WEIGHT].data, *bias = y->v[CONV_BIAS].data;
    for (size_t n = from; n < to; n++) {
        float sum = bias ? load_as(type, bias, n) : 0, now = input[n - from];
        for (size_t j = 0; j < kept; j++) {
            sum += load_as(type, weight, n * kernel + j) * load_as(state_type, window, n * kept + j);
            if (j) store_as(state_type, window, n * kept + j - 1, load_as(state_type, window, n * kept + j));
        }
        if (kept) store_as(state_type, window, n * kept + kept - 1, now);
        out[n - from] = sum + load_as(type, weight, n * kernel + kept) * now;
    }
}

// Outputs n0 to n1 of the in-projection of one row, c being their values: z | x B C | dt.
void mamba_inputs(const step *s, const product *p, size_t row, size_t n0, size_t n1, const float *c) {
    const layer *y = p->layer;
    size_t inner = (size_t)(y->heads * y->head_dim), conv = inner + 2 * (size_t)(y->groups * y->state_dim);
    size_t bytes = p->state->type == F32 ? 4 : 2, from = most(n0, inner), to = least(n1, inner + conv);
    float *out = p->out + row * p->ld;
    if (n0 < inner) silu(c, least(n1, inner) - n0, out + n0);
    if (from < to) {
        void *window = (char *)p->state->first + (size_t)s->batch->slots[row] * conv * (size_t)(y->kernel - 1) * bytes;
#define CONVOLVE(T, S) convolve(T, S, y, window, from - inner, to - inner, c + (from - n0), out + from)
        int type = y->v[CONV_WEIGHT].type;
        if (p->state->type != F32) CONVOLVE(type, p->state->type);
        else if (type == F32) CONVOLVE(F32, F32);
        else if (type == F16) CONVOLVE(F16, F32);
        else CONVOLVE(BF16, F32);
#undef CONVOLVE
        silu(out + from, to - from, out + from);
    }
    for (size_t n = most(n0, inner + conv); n < n1; n++) {
        float dt = softplus(c[n - n0] + at(y->v[DT_BIAS], n - inner - conv));
        out[n] = fminf(fmaxf(dt, y->dt_min), y->dt_max);
    }
}

// state[p, n] = decay * state[p, n] + (dt * x[p]) * B[n]; y[p] = (state[p, :] . C + D * x[p]) * gate[p]
static void head_step(float *state, size_t head_dim, size_t state_dim, const float *x, const float *b, const float *c, float dt,
                      float decay, float skip, const float *gate, float *y) {
    for (size_t p = 0; p < head_dim; p += 4) {
        size_t rows = least(head_dim - p, 4);
        vf sums[4] = {{0}};
        for (size_t r = 0; r < rows; r++) {
            float *row = state + (p + r) * state_dim, input = dt * x[p + r];
            size_t n = 0;
            for (; n + VW <= state_dim; n += VW) {
                vf new = vfma(vset(input), vload(b + n), decay * vload(row + n));
                vstore(row + n, new);
                sums[r] = vfma(new, vload(c + n), sums[r]);
            }
            if (n < state_dim) {
                size_t tail = state_dim - n;
                vf new = vfma(vset(input), vload_tail(F32, b, n, tail), decay * vload_tail(F32, row, n, tail));
                vstore_tail(row + n, new, tail);
                sums[r] = vfma(new, vload_tail(F32, c, n, tail), sums[r]);
            }
        }
        v4 dots = vsum4(sums[0], sums[1], sums[2], sums[3]);
        for (size_t r = 0; r < rows; r++) y[p + r] = (dots[r] + skip * x[p + r]) * gate[p + r];
    }
}

// RMS norm of each group of the gated outputs, into the thread's inputs.
static void norm_groups(lane *l, const layer *y) {
    const step *s = l->step;
    size_t size = (size_t)(y->heads * y->head_dim / y->groups);
    for (size_t row = 0; row < s->m && !pool_late(l->worker); row++)
        for (size_t n = 0; n < size * (size_t)y->groups; n += size)
            norm_row(s->inner + row * s->ld_inner + n, y->v[GATE_NORM], n, y->eps, size, l->x + row * l->ld_x + n);
}

void mamba_layer(lane *l, const layer *y, const layer_state *state) {
    const step *s = l->step;
    const matrix *in_proj = &y->w[IN_PROJ], *out_proj = &y->w[OUT_PROJ];
    size_t heads = (size_t)y->heads, head_dim = (size_t)y->head_dim, state_dim = (size_t)y->state_dim;
    size_t inner = heads * head_dim, groups = (size_t)y->groups;
    norm_rows(l, y->norm, y->eps, (size_t)in_proj->cols);
    product first = {.w = in_proj, .m = s->m, .out = s->wide, .ld = s->ld_wide, .after = MAMBA_INPUTS, .layer = y, .state = state};
    first.in = inputs_of(l, l->x, l->ld_x, (size_t)in_proj->cols, in_proj);
    multiply(l, &first, 1);
    const size_t tasks = s->m * heads;
    for (int64_t task; (task = pool_claim(l->worker, tasks)) != NO_TASK; pool_done(l->worker, tasks)) {
        size_t row = (size_t)task / heads, head = (size_t)task % heads, group = head / (heads / groups);
        const float *gate = s->wide + row * s->ld_wide, *x = gate + inner, *b = x + inner, *c = b + groups * state_dim;
        float dt = c[groups * state_dim + head], decay = expf(-dt * expf(at(y->v[A_LOG], head)));
        float *memory = (float *)state->second + ((size_t)s->batch->slots[row] * heads + head) * head_dim * state_dim;
        head_step(memory, head_dim, state_dim, x + head * head_dim, b + group * state_dim, c + group * state_dim, dt, decay,
                  at(y->v[SKIP], head), gate + head * head_dim, s->inner + row * s->ld_inner + head * head_dim);
    }
    pool_next(l->worker);
    norm_groups(l, y);
    product last = {.w = out_proj, .m = s->m, .out = s->hidden, .ld = s->ld_hidden, .after = ADD};
    last.in = inputs_of(l, l->x, l->ld_x, inner, out_proj);
    multiply(l, &last, 1);
}
