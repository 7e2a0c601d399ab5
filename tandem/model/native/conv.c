// The causal convolution of a chunk, channels last, fused with SiLU; and its gradients.
#include "scan.h"

section section_of(const place *at, size_t s) {
    size_t groups = (at->channels - at->d_inner) / (2 * at->n), x_columns = at->r * at->pp;
    if (s < at->r) return (section){(at->g * at->r + s) * at->p, s * at->pp, at->p};
    if (s == at->r) return (section){at->d_inner + at->g * at->n, x_columns, at->n};
    return (section){at->d_inner + (groups + at->g) * at->n, x_columns + at->np, at->n};
}

void ask_for_rows(const float *from, size_t stride, size_t count, size_t rows) {
    for (size_t l = 0; l < rows; l++, from += stride)
        for (size_t c = 0; c < count + 15; c += 16) __builtin_prefetch(from + (c < count ? c : count - 1), 0, 2);
}

void ask_for_chunk(const place *at, size_t t0) {
    if (t0 >= at->time) return;
    size_t rows = chunk_length(at, t0), inner = at->r * at->p;
    const float *row = at->projected + t0 * at->in_width, *b = row + at->d_inner + section_of(at, at->r).channel;
    const float *x = row + at->d_inner + at->g * inner, *c = row + at->d_inner + section_of(at, at->r + 1).channel;
    ask_for_rows(x, at->in_width, inner, rows);
    ask_for_rows(b, at->in_width, at->n, rows);
    ask_for_rows(c, at->in_width, at->n, rows);
    ask_for_rows(row + at->g * inner, at->in_width, inner, rows); // z
    ask_for_rows(row + at->d_inner + at->channels + at->g * at->r, at->in_width, at->r, rows);
}

// Channel 0 of the input at time t, which may lie before the sequence.
static const float *input_row(const scan_job *job, const place *at, int64_t t, const float *zeros) {
    if (t >= 0) return at->projected + (size_t)t * at->in_width + at->d_inner;
    if (!job->window) return zeros;
    size_t before = (size_t)(job->kernel - 1);
    return job->window + (at->b * before + before - (size_t)-t) * at->channels;
}

static int64_t segment_at(const scan_job *job, const place *at, int64_t t) {
    return job->segments[at->b * (size_t)job->time + (size_t)(t < 0 ? 0 : t)]; // the window belongs to the first document
}

void seen_rows(const scan_job *job, const place *at, size_t t0, size_t len, const float *zeros, const float **rows) {
    int64_t kernel = job->kernel;
    for (size_t l = 0; l < len; l++)
        for (int64_t k = 0; k < kernel; k++) {
            int64_t now = (int64_t)(t0 + l), t = now - (kernel - 1) + k;
            int other = job->segments && segment_at(job, at, t) != segment_at(job, at, now);
            rows[l * (size_t)kernel + (size_t)k] = other ? zeros : input_row(job, at, t, zeros);
        }
}

// The vector of channels c to c + n - 1; with n = VW a plain load.
INLINE vf load_some(const float *p, size_t n) { return n == VW ? vload(p) : vload_tail(F32, p, 0, n); }

INLINE void store_some(float *p, vf v, size_t n) {
    if (n == VW) {
        vstore(p, v);
    } else {
        vstore_tail(p, v, n);
    }
}

INLINE void convolve_some(const int kernel, const float *const *rows, const float *w, const float *bias, size_t channels,
                          size_t channel, size_t n, float *mixed, float *slope) {
    vf sum = load_some(bias + channel, n);
    UNROLL for (int k = 0; k < kernel; k++)
        sum = vfma(load_some(w + (size_t)k * channels + channel, n), load_some(rows[k] + channel, n), sum);
    vf open = 1.0f / (1.0f + vexp(-sum)), value = sum * open;
    vstore(mixed, value);
    if (slope) vstore(slope, open + value * (1.0f - open));
}

INLINE void convolve_rows(const int kernel, const scan_job *job, const place *at, const float *const *rows, size_t len,
                          float *mixed, float *slope) {
    for (size_t l = 0; l < len; l++)
        for (size_t s = 0; s < at->r + 2; s++) {
            section part = section_of(at, s);
            for (size_t c = 0; c < part.count; c += VW) {
                size_t n = part.count - c, to = l * at->width + part.column + c;
                float *out_slope = slope ? slope + to : NULL;
                const float *const *row = rows + l * (size_t)kernel;
                if (n >= VW) {
                    convolve_some(kernel, row, job->conv_weight, job->conv_bias, at->channels, part.channel + c, VW, mixed + to,
                                  out_slope);
                } else { // the padding of a head becomes silu(0) = 0
                    convolve_some(kernel, row, job->conv_weight, job->conv_bias, at->channels, part.channel + c, n, mixed + to,
                                  out_slope);
                }
            }
        }
}

void convolve(const scan_job *job, const place *at, const float *const *rows, size_t len, float *mixed, float *slope) {
    if (job->kernel == 4) {
        convolve_rows(4, job, at, rows, len, mixed, slope);
    } else {
        convolve_rows((int)job->kernel, job, at, rows, len, mixed, slope);
    }
}

// The gradient of input t for n channels: from the outputs at t to t + kernel - 1 that see it.
INLINE vf input_gradient(const int kernel, const scan_job *job, size_t channels, size_t channel, size_t n,
                         const float *const *later, size_t column) {
    vf sum = {0};
    UNROLL for (int k = 0; k < kernel; k++)
        sum = vfma(load_some(job->conv_weight + (size_t)(kernel - 1 - k) * channels + channel, n), vload(later[k] + column), sum);
    return sum;
}

INLINE void parameter_gradients(const int kernel, const scan_job *job, const place *at, const float *const *rows, size_t len,
                                size_t channel, size_t n, const float *grad) {
    size_t channels = at->channels;
    vf sums[MAX_KERNEL], bias = {0};
    UNROLL for (int k = 0; k < MAX_KERNEL; k++) sums[k] = (vf){0};
    for (size_t l = 0; l < len; l++) {
        vf g = vload(grad + l * at->width);
        bias += g;
        UNROLL for (int k = 0; k < kernel; k++)
            sums[k] = vfma(g, load_some(rows[l * (size_t)kernel + (size_t)k] + channel, n), sums[k]);
    }
    UNROLL for (int k = 0; k < kernel; k++) {
        float *w = job->grad_conv_weight + (at->b * (size_t)kernel + (size_t)k) * channels + channel;
        store_some(w, load_some(w, n) + sums[k], n);
    }
    float *b = job->grad_conv_bias + at->b * channels + channel;
    store_some(b, load_some(b, n) + bias, n);
}

INLINE void backward_rows(const int kernel, const scan_job *job, const place *at, const float *const *rows, size_t t0, size_t len,
                          const float *grad, const float *zeros) {
    for (size_t s = 0; s < at->r + 2; s++) {
        section part = section_of(at, s);
        for (size_t c = 0; c < part.count; c += VW) {
            if (part.count - c >= VW) {
                parameter_gradients(kernel, job, at, rows, len, part.channel + c, VW, grad + part.column + c);
            } else {
                parameter_gradients(kernel, job, at, rows, len, part.channel + c, part.count - c, grad + part.column + c);
            }
        }
    }
    int64_t before = kernel - 1, from = t0 == 0 && job->grad_window ? -before : 0;
    for (int64_t l = from; l < (int64_t)len; l++) {
        const float *later[MAX_KERNEL];
        int64_t t = (int64_t)t0 + l;
        for (int k = 0; k < kernel; k++) {
            int outside = l + k < 0 || t + k >= (int64_t)at->time;
            int other = !outside && job->segments && segment_at(job, at, t) != segment_at(job, at, t + k);
            later[k] = outside || other ? zeros : grad + (size_t)(l + k) * at->width;
        }
        float *to = t >= 0 ? job->grad_projected + (at->b * (size_t)job->time + (size_t)t) * at->in_width + at->d_inner
                           : job->grad_window + (at->b * (size_t)before + (size_t)(before + t)) * at->channels;
        for (size_t s = 0; s < at->r + 2; s++) {
            section part = section_of(at, s);
            for (size_t c = 0; c < part.count; c += VW) {
                size_t n = part.count - c, channel = part.channel + c;
                if (n >= VW) {
                    vstore(to + channel, input_gradient(kernel, job, at->channels, channel, VW, later, part.column + c));
                } else {
                    vstore_tail(to + channel, input_gradient(kernel, job, at->channels, channel, n, later, part.column + c), n);
                }
            }
        }
    }
}

void convolve_backward(const scan_job *job, const place *at, const float *const *rows, size_t t0, size_t len, const float *grad,
                       const float *zeros) {
    if (job->kernel == 4) {
        backward_rows(4, job, at, rows, t0, len, grad, zeros);
    } else {
        backward_rows((int)job->kernel, job, at, rows, t0, len, grad, zeros);
    }
}
