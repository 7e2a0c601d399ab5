// Backward: chunk by chunk from the end, with the gradient of the state at hand. Convolution, decays and scores are computed
// again; y before the gate and the states at chunk entry were kept.
//
// Gradients of the logarithms of decay need no matrix of their own. y_l without the skip is linear in e^(L_l), and what a
// token sends, to later tokens and to the state alike, in e^(-L_s):
//   dL_l += dy_l . (y_l - D x_l)      dL_s -= dt_s q_s, q_s = x_s . R_s      dL_end += dH' . H'
// where R_s is the gradient of dt_s x_s. The first of these sums runs over pairs that cancel those of the second.
#include "scan.h"
#include "tasks.h"

typedef struct {
    float *zeros, *mixed, *slope, *grad; // grad: of x, B and C, then before SiLU; kernel - 1 rows more
    float *b_turned, *scores, *decay, *weights, *grad_scores;
    float *grad_y, *received, *scaled, *turned, *state_turned, *gated, *fade;
    float *grad_states, *later; // of each group: of the states, and rows of `grad` of the chunk that follows
    const float **rows;
    pace *speed;
    size_t *first;
} backward_scratch;

static size_t lay_out(const place *at, const scan_job *job, float *base, backward_scratch *s) {
    size_t kernel = (size_t)job->kernel, groups = (size_t)job->task_groups, used = 0, widest = at->channels > at->width ? at->channels : at->width;
#define TAKE(name, type, count) \
    s->name = base ? (type *)(base + used) : NULL; \
    used += ((count) * sizeof(type) / sizeof(float) + 16) / 16 * 16
    TAKE(zeros, float, widest);
    TAKE(mixed, float, CHUNK * at->width);
    TAKE(slope, float, CHUNK * at->width);
    TAKE(grad, float, (CHUNK + kernel) * at->width);
    TAKE(b_turned, float, at->n * CHUNK);
    TAKE(scores, float, CHUNK * CHUNK);
    TAKE(decay, float, CHUNK * CHUNK);
    TAKE(weights, float, CHUNK * CHUNK);
    TAKE(grad_scores, float, CHUNK * CHUNK);
    TAKE(grad_y, float, CHUNK * at->r * at->pp);
    TAKE(received, float, CHUNK * at->pp);
    TAKE(scaled, float, CHUNK * at->pp);
    TAKE(turned, float, at->p * CHUNK);
    TAKE(state_turned, float, at->p * at->np);
    TAKE(grad_states, float, groups * at->r * at->n * at->pp);
    TAKE(later, float, groups * kernel * at->width);
    TAKE(gated, float, 2 * at->r * at->pp);
    TAKE(fade, float, CHUNK);
    TAKE(rows, const float *, CHUNK * kernel);
    TAKE(speed, pace, 1);
    TAKE(first, size_t, CHUNK);
#undef TAKE
    return used;
}

INLINE vf load_some(const float *p, size_t left) { return left >= VW ? vload(p) : vload_tail(F32, p, 0, left); }

INLINE void store_some(float *p, vf v, size_t left) {
    if (left >= VW) {
        vstore(p, v);
    } else {
        vstore_tail(p, v, left);
    }
}

// Gradients of y and z of one token from that of the normed output; adds that of the norm's weight.
static void norm_row_backward(const scan_job *job, const place *at, const float *y, const float *z, const float *grad_out,
                              float *gated, float *grad_y, float *grad_z) {
    const float *weight = job->norm_weight + at->g * at->r * at->p;
    float *open = gated + at->r * at->pp;
    vf squares = {0}, along = {0};
    for (size_t h = 0; h < at->r; h++)
        for (size_t c = 0; c < at->p; c += VW) {
            size_t from = h * at->p + c, to = h * at->pp + c, left = at->p - c;
            vf gate = load_some(z + from, left), o = 1.0f / (1.0f + vexp(-gate)), g = vload(y + to) * gate * o;
            vstore(open + to, o);
            vstore(gated + to, g);
            squares = vfma(g, g, squares);
            along = vfma(g, load_some(grad_out + from, left) * load_some(weight + from, left), along);
        }
    float size = (float)(at->r * at->p), scale = 1.0f / sqrtf(vsum(squares) / size + job->eps);
    vf unit = vset(scale), back = vset(scale * scale * scale * vsum(along) / size);
    float *grad_weight = job->grad_norm + at->b * at->d_inner + at->g * at->r * at->p;
    for (size_t h = 0; h < at->r; h++)
        for (size_t c = 0; c < at->p; c += VW) {
            size_t from = h * at->p + c, to = h * at->pp + c, left = at->p - c;
            vf g = vload(gated + to), o = vload(open + to), gate = load_some(z + from, left);
            vf out = load_some(grad_out + from, left), d = out * load_some(weight + from, left) * unit - g * back;
            store_some(grad_weight + from, vfma(out * unit, g, load_some(grad_weight + from, left)), left);
            vf silu = gate * o;
            store_some(grad_z + from, d * vload(y + to) * (o + silu * (1.0f - o)), left);
            vstore(grad_y + to, d * silu);
        }
}

INLINE float dot(const float *a, const float *b, size_t n) { // n is a multiple of VW
    vf sum = {0};
    for (size_t i = 0; i < n; i += VW) sum = vfma(vload(a + i), vload(b + i), sum);
    return vsum(sum);
}

INLINE void scale_row(float *out, const float *in, size_t n, float by) {
    for (size_t i = 0; i < n; i += VW) vstore(out + i, vload(in + i) * by);
}

// One head: adds to the gradients of x, B, C and of the scores, replaces that of the state by the one at the chunk's entry.
static void head_backward(const scan_job *job, const place *at, size_t t0, size_t len, size_t h, const float *y, size_t ldy,
                          const float *entering, const float *leaving, float *grad_state, backward_scratch *s) {
    const pace *v = s->speed;
    size_t pp = at->pp, width = at->width, head = at->g * at->r + h;
    const float *x = s->mixed + h * pp, *b = s->mixed + at->r * pp, *c = b + at->np;
    const float *grad_y = s->grad_y + h * pp;
    float *grad_x = s->grad + h * pp, *grad_b = s->grad + at->r * pp, *grad_c = grad_b + at->np;
    float skip = job->skip[head];
    size_t ld_grad_y = at->r * pp;

    fill_decay(v, len, s->first, s->decay);
    for (size_t l = 0; l < len; l++)
        for (size_t k = 0; k <= l; k += VW) {
            size_t to = l * CHUNK + k;
            vstore(s->weights + to, vload(s->decay + to) * vload(s->scores + to));
        }
    factors far = {b, width, 1, grad_state, pp}, near = {s->weights, 1, CHUNK, grad_y, ld_grad_y};
    sum_products(&far, at->n, v->to_end, FROM_ROW, &near, len, len, pp, s->received, pp);

    memset(s->turned, 0, at->p * CHUNK * sizeof(float));
    for (size_t l = 0; l < len; l++) scale_row(s->scaled + l * pp, x + l * width, pp, v->dt[l]);
    transpose(s->scaled, pp, len, at->p, s->turned, CHUNK);
    factors pairs = {grad_y, ld_grad_y, 1, s->turned, CHUNK};
    lower_product(&pairs, len, CHUNK, at->p, s->decay, s->grad_scores, CHUNK);

    float grad_skip = 0, grad_bias = 0;
    double grad_a = 0, sum = dot(leaving, grad_state, at->n * pp);
    for (size_t l = 0; l < len; l++) {
        const float *dy = grad_y + l * ld_grad_y, *now = x + l * width, *got = s->received + l * pp;
        float through_skip = dot(dy, now, pp), sent = dot(now, got, pp);
        grad_skip += through_skip;
        s->fade[l] = dot(dy, y + l * ldy, pp) - skip * through_skip;
        for (size_t i = 0; i < pp; i += VW)
            vstore(grad_x + l * width + i, vfma(vload(got + i), vset(v->dt[l]), vload(dy + i) * skip));
        s->turned[l] = sent; // no longer needed as a matrix
    }
    float *grad_dt = job->grad_projected + (at->b * (size_t)job->time + t0) * at->in_width + at->d_inner + at->channels + head;
    for (size_t l = len; l-- > 0;) {
        float sent = s->turned[l];
        sum += s->fade[l] - v->dt[l] * sent;
        float kept = (float)sum * v->counts[l], raw = (sent + v->a * kept) * v->slope[l];
        grad_a += kept * v->dt[l];
        grad_bias += raw;
        grad_dt[l * at->in_width] = raw;
    }
    size_t to = at->b * (size_t)job->heads + head;
    job->grad_skip[to] += grad_skip;
    job->grad_a[to] += (float)grad_a;
    job->grad_dt_bias[to] += grad_bias;

    for (size_t l = 0; l < len; l++) scale_row(s->scaled + l * pp, x + l * width, pp, v->dt[l] * v->to_end[l]);
    transpose(grad_state, pp, at->n, at->p, s->state_turned, at->np);
    factors sent = {s->scaled, pp, 1, s->state_turned, at->np};
    add_product(ALL, &sent, len, at->np, at->p, grad_b, width, 1);

    for (size_t l = 0; l < len; l++) scale_row(s->scaled + l * pp, grad_y + l * ld_grad_y, pp, v->from_start[l]);
    transpose(entering, pp, at->n, at->p, s->state_turned, at->np);
    factors read = {s->scaled, pp, 1, s->state_turned, at->np};
    add_product(ALL, &read, len, at->np, at->p, grad_c, width, 1);
    factors kept = {c, 1, width, s->scaled, pp};
    add_product(ALL, &kept, at->n, pp, len, grad_state, pp, v->survives);
}

static void ask_for_gradients(const scan_job *job, const place *at, size_t t0) {
    size_t row = at->b * (size_t)job->time + t0, ldy = (size_t)job->heads * at->pp, len = chunk_length(at, t0);
    ask_for_chunk(at, t0);
    ask_for_rows(job->y + row * ldy + at->g * at->r * at->pp, ldy, at->r * at->pp, len);
    ask_for_rows(job->grad_out + row * at->d_inner + at->g * at->r * at->p, at->d_inner, at->r * at->p, len);
}

static void chunk_backward(const scan_job *job, const place *at, size_t t0, const float *entering, float *grad_states,
                           float *later, backward_scratch *s) {
    size_t len = chunk_length(at, t0), row = at->b * (size_t)job->time + t0, inner = at->r * at->pp;
    size_t all_states = at->r * at->n * at->pp, first_head = at->g * at->r, ldy = (size_t)job->heads * at->pp;
    size_t later_bytes = (size_t)(job->kernel - 1) * at->width * sizeof(float);
    const float *y = job->y + row * ldy + first_head * at->pp;
    // The rows after this chunk's are those that the chunk after it begins with.
    memcpy(s->grad + CHUNK * at->width, later, later_bytes);
    find_documents(job, at, t0, len, s->first);
    seen_rows(job, at, t0, len, s->zeros, s->rows);
    convolve(job, at, s->rows, len, s->mixed, s->slope);
    for (size_t l = 0; l < len; l++) {
        size_t column = first_head * at->p;
        norm_row_backward(job, at, y + l * ldy, at->z + (t0 + l) * at->in_width, job->grad_out + (row + l) * at->d_inner + column,
                          s->gated, s->grad_y + l * inner, job->grad_projected + (row + l) * at->in_width + column);
    }
    const float *b = s->mixed + inner, *c = b + at->np;
    memset(s->b_turned, 0, at->n * CHUNK * sizeof(float));
    transpose(b, at->width, len, at->n, s->b_turned, CHUNK);
    factors scores = {c, at->width, 1, s->b_turned, CHUNK};
    lower_product(&scores, len, CHUNK, at->n, NULL, s->scores, CHUNK);
    memset(s->grad_scores, 0, CHUNK * CHUNK * sizeof(float));
    for (size_t l = 0; l < len; l++) memset(s->grad + l * at->width + inner, 0, 2 * at->np * sizeof(float));
    for (size_t h = 0; h < at->r; h++) {
        set_pace(job, at, t0, len, first_head + h, s->first, s->speed);
        const float *enters = entering + h * at->n * at->pp;
        head_backward(job, at, t0, len, h, y + h * at->pp, ldy, enters, enters + all_states, grad_states + h * at->n * at->pp, s);
    }
    factors for_c = {s->grad_scores, CHUNK, 1, b, at->width}, for_b = {s->grad_scores, 1, CHUNK, c, at->width};
    add_product(UP_TO_ROW, &for_c, len, at->np, len, s->grad + inner + at->np, at->width, 1);
    add_product(FROM_ROW, &for_b, len, at->np, len, s->grad + inner, at->width, 1);
    for (size_t i = 0; i < len * at->width; i += VW) vstore(s->grad + i, vload(s->grad + i) * vload(s->slope + i));
    convolve_backward(job, at, s->rows, t0, len, s->grad, s->zeros);
    memcpy(later, s->grad, later_bytes);
}

static void groups_backward(size_t index, float *scratch, const void *argument) {
    const scan_job *job = argument;
    size_t per_task = (size_t)job->task_groups, groups = (size_t)job->groups, tasks = (groups + per_task - 1) / per_task;
    size_t first = index % tasks * per_task, last = first + per_task < groups ? first + per_task : groups;
    place at = place_of(job, index / tasks, first);
    backward_scratch s;
    size_t used = lay_out(&at, job, scratch, &s);
    memset(scratch, 0, used * sizeof(float)); // what is not written is read as padding
    size_t one_state = at.n * at.pp, all_states = at.r * one_state, outside = at.p * at.n;
    size_t heads = at.b * (size_t)job->heads + first * at.r; // heads before the task's
    for (size_t h = 0; job->grad_final && h < (last - first) * at.r; h++)
        transpose(job->grad_final + (heads + h) * outside, at.n, at.p, at.n, s.grad_states + h * one_state, at.pp);
    size_t kept = ((size_t)job->time + CHUNK - 1) / CHUNK + 1; // states kept of a group
    for (size_t chunk = at.chunks; chunk-- > 0;)
        for (size_t g = first; g < last; g++) {
            at = place_of(job, at.b, g);
            const float *entering = job->entries + ((at.b * groups + g) * kept + chunk) * all_states;
            float *later = s.later + (g - first) * (size_t)job->kernel * at.width;
            chunk_backward(job, &at, chunk * CHUNK, entering, s.grad_states + (g - first) * all_states, later, &s);
            place next = place_of(job, at.b, g + 1 < last ? g + 1 : first);
            if (g + 1 < last || chunk) ask_for_gradients(job, &next, (g + 1 < last ? chunk : chunk - 1) * CHUNK);
        }
    for (size_t h = 0; job->grad_state && h < (last - first) * at.r; h++)
        transpose(s.grad_states + h * one_state, at.pp, at.n, at.p, job->grad_state + (heads + h) * outside, at.n);
}

// grad_projected is zero beforehand where padding makes rows that no task writes; sums of parameters are zero beforehand.
int tandem_scan_backward(scan_job *job, int threads) {
    job->task_groups = (int64_t)groups_of_task(job, threads);
    place at = place_of(job, 0, 0);
    backward_scratch unused;
    size_t tasks = (size_t)((job->groups + job->task_groups - 1) / job->task_groups * job->batch);
    return tasks_run(tasks, threads, lay_out(&at, job, NULL, &unused), groups_backward, job);
}
