// What a decoder is to the step: layers with pointers into the module's own parameters, and the batch of one step.
// The Python side (program.py) fills these structures; every field there has the same name and order.
#ifndef TANDEM_MODEL_H
#define TANDEM_MODEL_H

#include "gemm.h"
#include "pool.h"

enum { MAMBA, ATTENTION, MLP, MOE };
enum { IN_PROJ, OUT_PROJ };                                                                // matrices of a Mamba-2 layer
enum { Q_PROJ, K_PROJ, V_PROJ, O_PROJ };                                                   // of attention
enum { UP_PROJ, GATE_PROJ, DOWN_PROJ };                                                    // of an MLP
enum { ROUTER, EXPERT_UP, EXPERT_DOWN, SHARED_UP, SHARED_DOWN, LATENT_IN, LATENT_OUT };    // of experts
enum { CONV_WEIGHT, CONV_BIAS, A_LOG, SKIP, DT_BIAS, GATE_NORM };                          // vectors of a Mamba-2 layer
enum { Q_NORM, K_NORM };                                                                   // of attention
enum { CORRECTION };                                                                       // of experts
enum { KV_CHUNK = 256 }; // tokens that one task of attention reads; partial results are joined in order

typedef struct {
    const void *data; // NULL: not there
    int32_t type;
} vector;

typedef struct {
    int32_t kind;
    float eps;
    vector norm;
    matrix w[7]; // a matrix without data is not there; stacked experts are described by the first one
    vector v[6];
    int32_t heads, groups, head_dim, state_dim, kernel; // groups: of Mamba-2, key-value heads, groups of experts
    int32_t rope;                                       // index of the frequencies, -1 for none
    int32_t experts, top_k, top_groups, normalise;
    float dt_min, dt_max, score_scale;
} layer;

typedef struct {
    const float *frequencies; // radians a token of each rotated pair
    int32_t pairs;
} rotary;

typedef struct {
    int32_t hidden, num_layers, num_ropes;
    float eps; // of the final norm
    vector final_norm;
    matrix embedding, head;
    const layer *layers;
    const rotary *ropes;
} model;

// State of one layer: keys and values [blocks, kv_heads, block_size, head_dim], or the convolution window
// [slots, conv_width, kernel - 1] and the SSM state [slots, heads, head_dim, state_dim] in float32.
typedef struct {
    void *first, *second;
    int32_t type; // of keys, values and window
} layer_state;

typedef struct {
    int32_t rows, threads, max_blocks, block_size;
    const int64_t *ids, *lengths; // [rows]; lengths are the tokens before this one
    const int32_t *blocks;        // [rows, max_blocks]: token t lies in block t / block_size
    const int32_t *slots;         // [rows]: where a row's window and SSM state lie
    const layer_state *states;    // [layers]
    float *logits;                // [rows, vocabulary]
} batch;

// One step, as all threads see it.
typedef struct {
    const model *model;
    const batch *batch;
    size_t m, ld_hidden, ld_wide, ld_inner, chunks;
    float *hidden;  // [m, ld_hidden] the residual stream
    float *wide;    // [m, ld_wide] outputs of a layer's first products
    float *inner;   // [m, ld_inner] inputs of its last one
    float *partial; // [m, query heads, chunks, head_dim + 2] attention over each chunk: maximum, sum, weighted values
    float *turns;   // [ropes, m, 2, pairs] cosines and sines
    size_t max_pairs;
    float *pair_up, *pair_down; // [m * top_k, ...] outputs of routed experts
    size_t ld_up, ld_down;
} step;

// A row sent to an expert.
typedef struct pick {
    int32_t row, expert, place; // place among all picks sorted by expert
    float weight;
} pick;

// One thread's view: its scratch.
typedef struct {
    worker *worker;
    const step *step;
    float *x; // [m, ld_x] inputs of a product
    size_t ld_x;
    int16_t *q; // the same, quantised
    float *q_scale;
    float *packed, *c, *c2, *scratch;
    pick *picks;        // [m * top_k]
    float *gathered;    // [m * top_k, ld_x] inputs of the routed experts
} lane;

// What becomes of a product's outputs.
enum { STORE, ADD, SQUARED_RELU, GATED, MAMBA_INPUTS };

typedef struct {
    const matrix *w, *gate; // gate: a second matrix of the same shape, GATED only
    inputs in;
    size_t m;
    float *out;
    size_t ld;
    int after;
    const layer *layer; // MAMBA_INPUTS only
    const layer_state *state;
} product;

// Floats between rows such that rows do not fall on the same cache sets.
INLINE size_t padded(size_t n) { return (n + 31) / 16 * 16; }
INLINE float at(vector v, size_t i) { return load_as(v.type, v.data, i); }

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }
INLINE size_t most(size_t a, size_t b) { return a > b ? a : b; }

// out = x / rms(x) * weight, the weight from number `first` on.
void norm_row(const float *x, vector weight, size_t first, float eps, size_t size, float *out);
inputs inputs_of(lane *l, const float *x, size_t ld, size_t k, const matrix *w); // quantised as well if w is int8
void norm_rows(lane *l, vector weight, float eps, size_t size);                  // hidden -> x
void multiply(lane *l, const product *products, size_t count); // by all threads, up to where they must meet
void mamba_layer(lane *l, const layer *y, const layer_state *state);
void mamba_inputs(const step *s, const product *p, size_t row, size_t n0, size_t n1, const float *c);
void attention_layer(lane *l, const layer *y, const layer_state *state);
void mlp_layer(lane *l, const layer *y);
void moe_layer(lane *l, const layer *y);

#endif
