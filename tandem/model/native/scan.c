// Forward: see scan.h for the formulas.
#include "scan.h"
#include "tasks.h"

typedef struct {
    float *zeros, *mixed, *b_turned, *scores, *decay, *weighted, *state, *y, *gated;
    const float **rows;
    pace *speed;
    size_t *first;
} forward_scratch;

// Hands out the parts of a task's scratch; with base NULL only measures it.
static size_t lay_out(const place *at, size_t kernel, float *base, forward_scratch *s) {
    size_t used = 0;
#define TAKE(name, type, count) \
    s->name = base ? (type *)(base + used) : NULL; \
    used += ((count) * sizeof(type) / sizeof(float) + 16) / 16 * 16
    TAKE(zeros, float, at->channels);
    TAKE(mixed, float, CHUNK * at->width);
    TAKE(b_turned, float, at->n * CHUNK);
    TAKE(scores, float, CHUNK * CHUNK);
    TAKE(decay, float, CHUNK * CHUNK);
    TAKE(weighted, float, CHUNK * at->pp);
    TAKE(state, float, at->r * at->n * at->pp);
    TAKE(y, float, CHUNK * at->r * at->pp);
    TAKE(gated, float, at->r * at->pp);
    TAKE(rows, const float *, CHUNK * kernel);
    TAKE(speed, pace, 1);
    TAKE(first, size_t, CHUNK);
#undef TAKE
    return used;
}

size_t scan_scratch(const scan_job *job) {
    place at = place_of(job, 0);
    forward_scratch unused;
    return lay_out(&at, (size_t)job->kernel, NULL, &unused);
}

// y of one head over a chunk, and its state at the end.
static void scan_head(const scan_job *job, const place *at, size_t len, size_t h, forward_scratch *s, float *y, size_t ldy) {
    const pace *v = s->speed;
    const float *x = s->mixed + h * at->pp, *b = s->mixed + at->r * at->pp, *c = b + at->np;
    float *state = s->state + h * at->n * at->pp, skip = job->skip[at->g * at->r + h];
    fill_decay(v, len, s->first, s->decay);
    for (size_t l = 0; l < len; l++) {
        float *row = s->decay + l * CHUNK;
        const float *score = s->scores + l * CHUNK;
        for (size_t k = 0; k <= l; k += VW) vstore(row + k, vload(row + k) * vload(score + k) * vload(v->dt + k));
        row[l] += skip;
    }
    factors far = {c, at->width, 1, state, at->pp}, near = {s->decay, CHUNK, 1, x, at->width};
    sum_products(&far, at->n, v->from_start, UP_TO_ROW, &near, len, len, at->pp, y, ldy);
    for (size_t l = 0; l < len; l++) {
        vf share = vset(v->to_end[l] * v->dt[l]);
        for (size_t k = 0; k < at->pp; k += VW) vstore(s->weighted + l * at->pp + k, share * vload(x + l * at->width + k));
    }
    factors sent = {b, 1, at->width, s->weighted, at->pp};
    add_product(ALL, &sent, at->n, at->pp, len, state, at->pp, v->survives);
}

// out = y silu(z) / rms(y silu(z)) * weight, over the group's channels of one token.
static void norm_row(const scan_job *job, const place *at, const float *y, const float *z, float *gated, float *out) {
    vf squares = {0};
    for (size_t h = 0; h < at->r; h++)
        for (size_t c = 0; c < at->p; c += VW) {
            const float *gate = z + h * at->p + c;
            vf g = vload(y + h * at->pp + c) * vsilu(at->p - c >= VW ? vload(gate) : vload_tail(F32, gate, 0, at->p - c));
            vstore(gated + h * at->pp + c, g);
            squares = vfma(g, g, squares);
        }
    vf scale = vset(1.0f / sqrtf(vsum(squares) / (float)(at->r * at->p) + job->eps));
    const float *weight = job->norm_weight + at->g * at->r * at->p;
    for (size_t h = 0; h < at->r; h++)
        for (size_t c = 0; c < at->p; c += VW) {
            size_t to = h * at->p + c;
            vf g = vload(gated + h * at->pp + c) * scale;
            if (at->p - c >= VW) {
                vstore(out + to, g * vload(weight + to));
            } else {
                vstore_tail(out + to, g * vload_tail(F32, weight, to, at->p - c), at->p - c);
            }
        }
}

static void scan_group(size_t index, float *scratch, const void *argument) {
    const scan_job *job = argument;
    place at = place_of(job, index);
    forward_scratch s;
    lay_out(&at, (size_t)job->kernel, scratch, &s);
    size_t one_state = at.n * at.pp, all_states = at.r * one_state, first_head = at.g * at.r;
    memset(s.zeros, 0, at.channels * sizeof(float));
    memset(s.decay, 0, CHUNK * CHUNK * sizeof(float));
    memset(s.scores, 0, CHUNK * CHUNK * sizeof(float));
    memset(s.state, 0, all_states * sizeof(float));
    size_t outside = (at.b * (size_t)job->heads + first_head) * at.p * at.n;
    if (job->state)
        for (size_t h = 0; h < at.r; h++)
            transpose(job->state + outside + h * at.p * at.n, at.n, at.p, at.n, s.state + h * one_state, at.pp);
    size_t total_chunks = ((size_t)job->time + CHUNK - 1) / CHUNK;
    float *entry = job->entries ? job->entries + index * (total_chunks + 1) * all_states : NULL;
    for (size_t t0 = 0; t0 < at.time; t0 += CHUNK) {
        size_t len = chunk_length(&at, t0), row = at.b * (size_t)job->time + t0;
        if (entry) memcpy(entry + t0 / CHUNK * all_states, s.state, all_states * sizeof(float));
        find_documents(job, &at, t0, len, s.first);
        seen_rows(job, &at, t0, len, s.zeros, s.rows);
        convolve(job, &at, s.rows, len, s.mixed, NULL);
        const float *b = s.mixed + at.r * at.pp, *c = b + at.np;
        for (size_t k = 0; k < at.n; k++) memset(s.b_turned + k * CHUNK, 0, CHUNK * sizeof(float));
        transpose(b, at.width, len, at.n, s.b_turned, CHUNK);
        factors scores = {c, at.width, 1, s.b_turned, CHUNK};
        lower_product(&scores, len, CHUNK, at.n, NULL, s.scores, CHUNK);
        size_t ldy = job->y ? (size_t)job->heads * at.pp : at.r * at.pp;
        float *y = job->y ? job->y + row * ldy + first_head * at.pp : s.y;
        for (size_t h = 0; h < at.r; h++) {
            set_pace(job, &at, t0, len, first_head + h, s.first, s.speed);
            scan_head(job, &at, len, h, &s, y + h * at.pp, ldy);
        }
        for (size_t l = 0; l < len; l++)
            norm_row(job, &at, y + l * ldy, at.z + (t0 + l) * at.in_width, s.gated,
                     job->out + (row + l) * at.d_inner + first_head * at.p);
    }
    for (size_t t = at.time; t < (size_t)job->time; t++) // padding
        memset(job->out + (at.b * (size_t)job->time + t) * at.d_inner + first_head * at.p, 0, at.r * at.p * sizeof(float));
    if (entry) memcpy(entry + at.chunks * all_states, s.state, all_states * sizeof(float));
    for (size_t h = 0; h < at.r; h++)
        transpose(s.state + h * one_state, at.pp, at.n, at.p, job->final + outside + h * at.p * at.n, at.n);
}

// Returns 0, or -1 without memory.
int tandem_scan(const scan_job *job, int threads) {
    return tasks_run((size_t)(job->batch * job->groups), threads, scan_scratch(job), scan_group, job);
}
