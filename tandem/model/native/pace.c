// How fast the state fades: step sizes, decays within a chunk, and where documents end.
#include "scan.h"

size_t groups_of_task(const scan_job *job, int threads) {
    size_t groups = (size_t)job->groups, batch = (size_t)(job->batch > 0 ? job->batch : 1);
    size_t parts = (2 * (size_t)threads + batch - 1) / batch;
    return parts < groups ? (groups + parts - 1) / parts : 1;
}

place place_of(const scan_job *job, size_t b, size_t g) {
    place at = {.b = b, .g = g};
    at.r = (size_t)(job->heads / job->groups);
    at.p = (size_t)job->head_dim;
    at.n = (size_t)job->state_dim;
    at.pp = padded(at.p);
    at.np = padded(at.n);
    at.d_inner = (size_t)(job->heads * job->head_dim);
    at.channels = at.d_inner + 2 * (size_t)(job->groups * job->state_dim);
    at.in_width = at.d_inner + at.channels + (size_t)job->heads;
    at.width = at.r * at.pp + 2 * at.np;
    at.time = (size_t)(job->lengths ? job->lengths[at.b] : job->time);
    at.chunks = (at.time + CHUNK - 1) / CHUNK;
    at.projected = job->projected + at.b * (size_t)job->time * at.in_width;
    at.z = at.projected + at.g * at.r * at.p;
    return at;
}

size_t chunk_length(const place *at, size_t t0) { return at->time - t0 < CHUNK ? at->time - t0 : CHUNK; }

void find_documents(const scan_job *job, const place *at, size_t t0, size_t len, size_t *first) {
    const int64_t *segments = job->segments ? job->segments + at->b * (size_t)job->time + t0 : NULL;
    int64_t entering = segments ? segments[t0 ? -1 : 0] : 0;
    // first[l] is CHUNK where position l continues the document that enters the chunk from before its first position.
    size_t begin = CHUNK;
    for (size_t l = 0; l < len; l++) {
        if (segments && segments[l] != (l ? segments[l - 1] : entering)) begin = l;
        first[l] = begin;
    }
}

// log(1 + u) for u in [0, 1], by the series of 2 atanh(u / (2 + u)).
INLINE vf log1p_of_fraction(vf u) {
    vf s = u / (2.0f + u), q = s * s;
    vf sum = vset(2.0f / 15);
    sum = vfma(sum, q, vset(2.0f / 13));
    sum = vfma(sum, q, vset(2.0f / 11));
    sum = vfma(sum, q, vset(2.0f / 9));
    sum = vfma(sum, q, vset(2.0f / 7));
    sum = vfma(sum, q, vset(2.0f / 5));
    sum = vfma(sum, q, vset(2.0f / 3));
    sum = vfma(sum, q, vset(2.0f));
    return sum * s;
}

void set_pace(const scan_job *job, const place *at, size_t t0, size_t len, size_t head, const size_t *first, pace *out) {
    const float *raw = at->projected + t0 * at->in_width + at->d_inner + at->channels + head;
    float bias = job->dt_bias[head];
    for (size_t l = 0; l < CHUNK; l++) out->dt[l] = l < len ? raw[l * at->in_width] + bias : 0;
    for (size_t l = 0; l < len; l += VW) {
        vf x = vload(out->dt + l), small = vexp(vmin(x, -x)); // e^-|x|
        vf dt = vmax(x, (vf){0}) + log1p_of_fraction(small);
        vf slope = vselect(x > 0.0f, vset(1.0f), small) / (1.0f + small);
        vi inside = (dt >= job->dt_min) & (dt <= job->dt_max);
        vstore(out->slope + l, vselect(inside, slope, (vf){0}));
        vstore(out->dt + l, vmin(vmax(dt, vset(job->dt_min)), vset(job->dt_max)));
    }
    out->a = -expf(job->a_log[head]);
    double sums[CHUNK], sum = 0;
    for (size_t l = 0; l < CHUNK; l++) {
        float step = l < len ? out->dt[l] * out->a : 0;
        out->counts[l] = step >= FORGOTTEN;
        sums[l] = sum += out->counts[l] ? step : FORGOTTEN;
        double whole = rint(sum);
        out->whole[l] = (float)whole;
        out->part[l] = (float)(sum - whole);
    }
    for (size_t l = 0; l < CHUNK; l++) {
        out->from_start[l] = (float)sums[l];
        out->to_end[l] = (float)(sum - sums[l]);
    }
    for (size_t l = 0; l < CHUNK; l += VW) {
        vstore(out->from_start + l, vexp(vload(out->from_start + l)));
        vstore(out->to_end + l, vexp(vload(out->to_end + l)));
    }
    size_t last = first[len - 1];
    for (size_t l = 0; l < len; l++) {
        if (first[l] != CHUNK) out->from_start[l] = 0;
        if (first[l] != last) out->to_end[l] = 0;
    }
    out->survives = last == CHUNK ? expf((float)sum) : 0;
}

void fill_decay(const pace *at, size_t len, const size_t *first, float *decay) {
    vi lane;
    for (int i = 0; i < VW; i++) lane[i] = i;
    for (size_t l = 0; l < len; l++) {
        int32_t begin = first[l] == CHUNK ? 0 : (int32_t)first[l];
        vf whole = vset(at->whole[l]), part = vset(at->part[l]);
        for (size_t s = 0; s <= l; s += VW) {
            vi position = lane + (int32_t)s;
            vi visible = (position >= begin) & (position <= (int32_t)l);
            vf kept = vexp((whole - vload(at->whole + s)) + (part - vload(at->part + s)));
            vstore(decay + l * CHUNK + s, (vf)(visible & (vi)kept));
        }
    }
}
