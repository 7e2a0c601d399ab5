// Mixture of experts for one token of each row: a sigmoid router, the chosen experts (squared ReLU), a shared expert, and
// projections into and out of a narrower latent where there is one. Each row adds its experts up in order of their index.
#include "model.h"

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Index of the largest of `count` values, the first of equals.
static size_t largest(const float *values, size_t count) {
    size_t best = 0;
    for (size_t i = 1; i < count; i++)
        if (values[i] > values[best]) best = i;
    return best;
}

// Leaves only the experts of the best groups: those whose two best scores add up to most.
static void keep_groups(const layer *y, float *ranked) {
    size_t experts = (size_t)y->experts, groups = (size_t)y->groups, size = experts / groups;
    for (size_t drop = groups - (size_t)y->top_groups; drop > 0; drop--) {
        size_t worst = 0;
        float lowest = INFINITY;
        for (size_t g = 0; g < groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (size_t e = g * size; e < (g + 1) * size; e++) {
                if (ranked[e] > first) second = first, first = ranked[e];
                else if (ranked[e] > second) second = ranked[e];
            }
            float sum = size > 1 ? first + second : first;
            if (first > -INFINITY && sum <= lowest) lowest = sum, worst = g;
        }
        for (size_t e = worst * size; e < (worst + 1) * size; e++) ranked[e] = -INFINITY;
    }
}

// The experts of one row with their weights, by index.
static void route(const layer *y, const float *logits, float *ranked, size_t row, pick *picks) {
    size_t experts = (size_t)y->experts, top_k = (size_t)y->top_k;
    float sum = 0;
    for (size_t e = 0; e < experts; e++) ranked[e] = sigmoid(logits[e]) + at(y->v[CORRECTION], e);
    if (y->groups > 1) keep_groups(y, ranked);
    for (size_t k = 0; k < top_k; k++) {
        size_t e = largest(ranked, experts), slot = k;
        ranked[e] = -INFINITY;
        for (; slot > 0 && picks[slot - 1].expert > (int32_t)e; slot--) picks[slot] = picks[slot - 1];
        picks[slot] = (pick){.row = (int32_t)row, .expert = (int32_t)e, .weight = sigmoid(logits[e])};
    }
    for (size_t k = 0; k < top_k; k++) sum += picks[k].weight;
    for (size_t k = 0; k < top_k; k++) picks[k].weight *= y->normalise ? y->score_scale / (sum + 1e-20f) : y->score_scale;
}

// A thread's tables of the experts in use.
typedef struct {
    product *products;
    matrix *matrices;
    float *ranked;
    int32_t *ends; // of each expert's rows among all picks sorted by expert
} tables;

// Products of every expert in use with its rows of `in`; `stacked` is the first expert's matrix. Returns their number.
static size_t of_experts(const layer *y, const matrix *stacked, tables *t, const float *in, size_t ld_in, float *out, size_t ld_out,
                         int after) {
    size_t count = 0, bytes = (size_t)(stacked->rows * stacked->cols) * (stacked->type == F32 ? 4 : 2);
    for (size_t e = 0; e < (size_t)y->experts; e++) {
        size_t begin = e ? (size_t)t->ends[e - 1] : 0, rows = (size_t)t->ends[e] - begin;
        if (!rows) continue;
        t->matrices[count] = *stacked;
        t->matrices[count].data = (const char *)stacked->data + e * bytes;
        t->products[count] = (product){.w = &t->matrices[count], .m = rows, .ld = ld_out, .after = after};
        t->products[count].out = out + begin * ld_out;
        t->products[count].in = (inputs){in + begin * ld_in, ld_in, NULL, NULL};
        count++;
    }
    return count;
}

// Chooses the experts of all rows and gathers their inputs, sorted by expert and then by row.
static void gather(lane *l, const layer *y, tables *t, const float *in, size_t ld_in, size_t width) {
    const step *s = l->step;
    size_t top_k = (size_t)y->top_k, picks = s->m * top_k;
    memset(t->ends, 0, (size_t)y->experts * sizeof(int32_t));
    for (size_t row = 0; row < s->m; row++) route(y, s->wide + row * s->ld_wide, t->ranked, row, l->picks + row * top_k);
    for (size_t i = 0; i < picks; i++)
        if (l->picks[i].expert + 1 < y->experts) t->ends[l->picks[i].expert + 1]++;
    for (int e = 1; e < y->experts; e++) t->ends[e] += t->ends[e - 1]; // where each expert begins
    for (size_t i = 0; i < picks; i++) {
        pick *p = &l->picks[i];
        p->place = t->ends[p->expert]++; // and, in the end, where it ends
        memcpy(l->gathered + (size_t)p->place * l->ld_x, in + (size_t)p->row * ld_in, width * sizeof(float));
    }
}

// out[n] += sum over the row's experts, in order of their index.
static void add_experts(const lane *l, const layer *y, size_t row, float *out) {
    const step *s = l->step;
    for (size_t k = 0; k < (size_t)y->top_k; k++) {
        const pick *p = &l->picks[row * (size_t)y->top_k + k];
        const float *expert = s->pair_down + (size_t)p->place * s->ld_down;
        for (size_t n = 0; n < (size_t)y->w[EXPERT_DOWN].rows; n++) out[n] += p->weight * expert[n];
    }
}

void moe_layer(lane *l, const layer *y) {
    const step *s = l->step;
    const matrix *router = &y->w[ROUTER], *up = &y->w[EXPERT_UP], *down = &y->w[EXPERT_DOWN], *into = &y->w[LATENT_IN];
    const matrix *shared_up = &y->w[SHARED_UP], *shared_down = &y->w[SHARED_DOWN], *out_of = &y->w[LATENT_OUT];
    const size_t hidden = (size_t)router->cols, experts = (size_t)y->experts, width = (size_t)up->cols;
    tables t = {.products = (product *)l->scratch};
    t.matrices = (matrix *)(t.products + experts + 1);
    t.ranked = (float *)(t.matrices + experts);
    t.ends = (int32_t *)(t.ranked + experts);

    norm_rows(l, y->norm, y->eps, hidden);
    product first[3] = {{.w = router, .m = s->m, .out = s->wide, .ld = s->ld_wide, .after = STORE}};
    size_t count = 1;
    if (into->data) first[count++] = (product){.w = into, .m = s->m, .out = s->wide + experts, .ld = s->ld_wide, .after = STORE};
    if (shared_up->data)
        first[count++] = (product){.w = shared_up, .m = s->m, .out = s->inner, .ld = s->ld_inner, .after = SQUARED_RELU};
    for (size_t i = count; i-- > 0;) first[i].in = inputs_of(l, l->x, l->ld_x, hidden, first[i].w);
    multiply(l, first, count);

    if (!into->data) norm_rows(l, y->norm, y->eps, hidden); // again: a thread that was late for the phase before has no inputs
    gather(l, y, &t, into->data ? s->wide + experts : l->x, into->data ? s->ld_wide : l->ld_x, width);
    count = of_experts(y, up, &t, l->gathered, l->ld_x, s->pair_up, s->ld_up, SQUARED_RELU);
    multiply(l, t.products, count);
    count = of_experts(y, down, &t, s->pair_up, s->ld_up, s->pair_down, s->ld_down, STORE);
    if (shared_down->data) {
        product *shared = &t.products[count++];
        *shared = (product){.w = shared_down, .m = s->m, .out = s->hidden, .ld = s->ld_hidden, .after = ADD};
        shared->in = inputs_of(l, s->inner, s->ld_inner, (size_t)shared_down->cols, shared_down);
    }
    multiply(l, t.products, count);

    if (!out_of->data) {
        for (int64_t row; (row = pool_claim(l->worker, s->m)) != NO_TASK; pool_done(l->worker, s->m))
            add_experts(l, y, (size_t)row, s->hidden + (size_t)row * s->ld_hidden);
        pool_next(l->worker);
        return;
    }
    for (size_t row = 0; row < s->m; row++) {
        memset(l->x + row * l->ld_x, 0, width * sizeof(float));
        add_experts(l, y, row, l->x + row * l->ld_x);
    }
    product last = {.w = out_of, .m = s->m, .out = s->hidden, .ld = s->ld_hidden, .after = ADD};
    last.in = inputs_of(l, l->x, l->ld_x, width, out_of);
    multiply(l, &last, 1);
}
