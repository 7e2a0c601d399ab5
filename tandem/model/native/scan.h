// The Mamba-2 mixer between its two projections: convolution, SiLU, step sizes, chunked scan, skip, gate, group norm.
// Everything is local to one sequence and one group of heads, which share B, C and the norm. A task is one sequence and some
// groups: it walks over chunks of time with their states at hand, all its groups a chunk, so that a row's pages are met once. Within a chunk (l, s positions; e^L decay from the chunk's start; dt step sizes; H state at entry):
//   y_l = e^(L_l) C_l H + sum over s <= l of (C_l . B_s) e^(L_l - L_s) dt_s x_s + D x_l
//   H'  = e^(L_end) H + sum over s of e^(L_end - L_s) dt_s B_s x_s
// Semantics and reference: tandem/model/scan.py and mamba2.py.
#ifndef TANDEM_SCAN_H
#define TANDEM_SCAN_H

#include "tile.h"

enum { CHUNK = 64, MAX_KERNEL = 8, FORGOTTEN = -200 }; // FORGOTTEN: logarithm of a decay that leaves nothing

typedef struct {
    int64_t batch, time, heads, head_dim, groups, state_dim, kernel;
    float eps, dt_min, dt_max;
    const float *projected;   // [batch, time, in_width]: z, x, B, C, dt
    const float *conv_weight; // [kernel, channels]
    const float *conv_bias;   // [channels]
    const float *dt_bias, *a_log, *skip; // [heads]
    const float *norm_weight; // [d_inner]
    const float *window;      // [batch, kernel - 1, channels] or NULL
    const float *state;       // [batch, heads, head_dim, state_dim] or NULL
    const int64_t *segments;  // [batch, time] or NULL
    const int64_t *lengths;   // [batch] or NULL
    float *out;               // [batch, time, d_inner]
    float *final;             // as state
    float *entries;           // training: states at chunk entry and the final one, [batch, groups, chunks + 1, r, n, padded p]
    float *y;                 // training: before the gate, [batch, time, heads, padded p]
    // Backward only. Gradients of parameters are summed within a sequence: [batch, ...].
    const float *grad_out, *grad_final;
    float *grad_projected, *grad_conv_weight, *grad_conv_bias, *grad_dt_bias, *grad_a, *grad_skip, *grad_norm;
    float *grad_window, *grad_state;
    int64_t task_groups; // set by the entry points
} scan_job;

// Where things are, for one sequence and group.
typedef struct {
    size_t b, g, r, p, n, pp, np;       // r heads of the group; pp and np are p and n padded to whole vectors
    size_t d_inner, channels, in_width; // of the layer
    size_t width;                       // of a row of x, B and C of this group in scratch: r * pp + 2 * np
    size_t time;                        // tokens of this sequence that count
    size_t chunks;
    const float *projected, *z;         // of this sequence; z of this group
} place;

// A run of channels that lie side by side both in memory and in scratch: a head's x, or B, or C.
typedef struct {
    size_t channel, column, count; // first channel of the convolution, first column in scratch
} section;

// Per head and chunk.
typedef struct {
    float dt[CHUNK], slope[CHUNK]; // step sizes and their derivative by the raw number
    float whole[CHUNK], part[CHUNK]; // L in two parts, whole numbers and fractions, so that differences lose no digits
    float counts[CHUNK];           // 0 where a step forgets everything: a bound, without derivative
    float from_start[CHUNK];       // e^L, 0 in later documents
    float to_end[CHUNK];           // e^(L_end - L), 0 in earlier documents
    float survives, a;
} pace;

place place_of(const scan_job *job, size_t b, size_t g);
// How many groups a task has: all, if there are sequences enough to keep the threads busy. No result depends on it.
size_t groups_of_task(const scan_job *job, int threads);
size_t chunk_length(const place *at, size_t t0);
// Number s of the sections of a group: r heads of x, then B, then C.
section section_of(const place *at, size_t s);

// Asks the memory for `count` floats of each of `rows` rows, which lie too far apart for the CPU to guess.
void ask_for_rows(const float *from, size_t stride, size_t count, size_t rows);
// The same for what a chunk reads of `projected`; nothing where t0 is outside the sequence.
void ask_for_chunk(const place *at, size_t t0);
// Rows that the kernel sees at each position of the chunk: [CHUNK][kernel], of all channels; zeros where there is none.
void seen_rows(const scan_job *job, const place *at, size_t t0, size_t len, const float *zeros, const float **rows);
// x, B and C of the chunk after convolution and SiLU, [len, width]; with `slope`, the derivative of SiLU there.
void convolve(const scan_job *job, const place *at, const float *const *rows, size_t len, float *mixed, float *slope);
// The gradient of the convolution, from that of its output before SiLU: `grad` has kernel - 1 more rows, those of the tokens
// that follow.
void convolve_backward(const scan_job *job, const place *at, const float *const *rows, size_t t0, size_t len, const float *grad,
                       const float *zeros);
// First position of the chunk in the document of each position; what enters and what leaves.
void find_documents(const scan_job *job, const place *at, size_t t0, size_t len, size_t *first);
void set_pace(const scan_job *job, const place *at, size_t t0, size_t len, size_t head, const size_t *first, pace *out);
// decay[l, s] = e^(L_l - L_s) within a document for s <= l, else 0; [CHUNK][CHUNK], zero above the diagonal beforehand.
void fill_decay(const pace *at, size_t len, const size_t *first, float *decay);

#endif
