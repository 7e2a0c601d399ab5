// Forward: see scan.h for the formulas.
#include "scan.h"
#include "tasks.h"

typedef struct {
    float *zeros, *mixed, *b_turned, *scores, *decay, *weighted, *states, *y, *gated;
    const float **rows;
    pace *speed;
    size_t *first;
} forward_scratch;

// Hands out the parts of a task's scratch; with base NULL only measures it.
static size_t lay_out(const place *at, const scan_job *job, float *base, forward_scratch *s) {
    size_t kernel = (size_t)job->kernel, states = (size_t)job->task_groups * at->r * at->n * at->pp;
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
    TAKE(states, float, states);
    TAKE(y, float, CHUNK * at->r * at->pp);
    TAKE(gated, float, at->r * at->pp);
    TAKE(rows, const float *, CHUNK * kernel);
    TAKE(speed, pace, 1);
    TAKE(first, size_t, CHUNK);
#undef TAKE
    return used;
}

// y of one head over a chunk, and its state at the end.
static void scan_head(const scan_job *job, const place *at, size_t len, size_t h, forward_scratch *s, float *state, float *y,
                      size_t ldy) {
    const pace *v = s->speed;
    const float *x = s->mixed + h * at->pp, *b = s->mixed + at->r * at->pp, *c = b + at->np;
    float skip = job->skip[at->g * at->r + h];
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

// One chunk of one group; `states` are those of its heads at entry, and then at the end.
static void scan_chunk(const scan_job *job, const place *at, size_t t0, float *states, forward_scratch *s) {
    size_t len = chunk_length(at, t0), row = at->b * (size_t)job->time + t0, inner = at->r * at->pp, first_head = at->g * at->r;
    find_documents(job, at, t0, len, s->first);
    seen_rows(job, at, t0, len, s->zeros, s->rows);
    convolve(job, at, s->rows, len, s->mixed, NULL);
    const float *b = s->mixed + inner, *c = b + at->np;
    memset(s->b_turned, 0, at->n * CHUNK * sizeof(float));
    transpose(b, at->width, len, at->n, s->b_turned, CHUNK);
    factors scores = {c, at->width, 1, s->b_turned, CHUNK};
    lower_product(&scores, len, CHUNK, at->n, NULL, s->scores, CHUNK);
    size_t ldy = job->y ? (size_t)job->heads * at->pp : inner;
    float *y = job->y ? job->y + row * ldy + first_head * at->pp : s->y;
    for (size_t h = 0; h < at->r; h++) {
        set_pace(job, at, t0, len, first_head + h, s->first, s->speed);
        scan_head(job, at, len, h, s, states + h * at->n * at->pp, y + h * at->pp, ldy);
    }
    for (size_t l = 0; l < len; l++)
        norm_row(job, at, y + l * ldy, at->z + (t0 + l) * at->in_width, s->gated,
                 job->out + (row + l) * at->d_inner + first_head * at->p);
}

static void scan_groups(size_t index, float *scratch, const void *argument) {
    const scan_job *job = argument;
    size_t per_task = (size_t)job->task_groups, groups = (size_t)job->groups, tasks = (groups + per_task - 1) / per_task;
    size_t first = index % tasks * per_task, last = first + per_task < groups ? first + per_task : groups;
    place at = place_of(job, index / tasks, first);
    forward_scratch s;
    lay_out(&at, job, scratch, &s);
    size_t one_state = at.n * at.pp, all_states = at.r * one_state, outside = at.p * at.n;
    memset(s.zeros, 0, at.channels * sizeof(float));
    memset(s.decay, 0, CHUNK * CHUNK * sizeof(float));
    memset(s.scores, 0, CHUNK * CHUNK * sizeof(float));
    memset(s.states, 0, (last - first) * all_states * sizeof(float));
    size_t heads = at.b * (size_t)job->heads + first * at.r; // heads before the task's
    for (size_t h = 0; job->state && h < (last - first) * at.r; h++)
        transpose(job->state + (heads + h) * outside, at.n, at.p, at.n, s.states + h * one_state, at.pp);
    size_t kept = ((size_t)job->time + CHUNK - 1) / CHUNK + 1; // states kept of a group
    for (size_t chunk = 0; chunk <= at.chunks; chunk++)
        for (size_t g = first; g < last; g++) {
            at = place_of(job, at.b, g);
            float *states = s.states + (g - first) * all_states;
            float *entry = job->entries ? job->entries + ((at.b * groups + g) * kept + chunk) * all_states : NULL;
            if (entry) memcpy(entry, states, all_states * sizeof(float));
            if (chunk == at.chunks) continue;
            scan_chunk(job, &at, chunk * CHUNK, states, &s);
            place next = place_of(job, at.b, g + 1 < last ? g + 1 : first);
            ask_for_chunk(&next, (g + 1 < last ? chunk : chunk + 1) * CHUNK);
        }
    size_t inner = at.r * at.p;
    for (size_t t = at.time; t < (size_t)job->time; t++) // padding
        memset(job->out + (at.b * (size_t)job->time + t) * at.d_inner + first * inner, 0, (last - first) * inner * sizeof(float));
    for (size_t h = 0; h < (last - first) * at.r; h++)
        transpose(s.states + h * one_state, at.pp, at.n, at.p, job->final + (heads + h) * outside, at.n);
}

// Returns 0, or -1 without memory.
int tandem_scan(scan_job *job, int threads) {
    job->task_groups = (int64_t)groups_of_task(job, threads);
    place at = place_of(job, 0, 0);
    forward_scratch unused;
    size_t tasks = (size_t)((job->groups + job->task_groups - 1) / job->task_groups * job->batch);
    return tasks_run(tasks, threads, lay_out(&at, job, NULL, &unused), scan_groups, job);
}
