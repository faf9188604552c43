/* A token for each row of logits: see decoding/draws.py for what is drawn.

   Written once in plain C whose loops the compiler turns into registers, compiled for each set of
   instructions. Sums go in an order that no set of instructions changes, and what a row draws does
   not depend on the others. */
#include "bits.h"
#include "levels.h"
#include <float.h>
#include <math.h>
#include <stdlib.h>

/* All that takes or gives registers is inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"

enum { LANES = 16, RUN = 256, MOST_RUNS = 1024, BUCKETS = 1024 };
enum { BROKEN = -1, NO_TOKEN = -2, NO_ROOM = -3 };

#define NEAR (-8.0f)      /* how far below the likeliest most cuts are decided */
#define FARTHEST (-87.0f) /* chances below are none */

/* temperature: 0: the likeliest. */
struct how {
    double u, temperature, top_k, top_p, min_p;
};

struct draw {
    const void *logits; /* (rows, ids), `stride` values from one row to the next */
    const struct how *how;
    int64_t *tokens;
    int64_t ids, stride;
};

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE float value_at(const int bf16, const void *from, int64_t i) {
    return bf16 ? float_of_bits((uint32_t)((const uint16_t *)from)[i] << 16)
                : ((const float *)from)[i];
}

/* LANES of them, those from `to` on -inf. */
INLINE floats values_at(const int bf16, const void *from, int64_t i, int64_t to) {
    floats found;
    if (i + LANES > to) {
        for (int l = 0; l < LANES; l++)
            found[l] = i + l < to ? value_at(bf16, from, i + l) : -INFINITY;
    } else if (bf16) {
        halves own;
        memcpy(&own, (const uint16_t *)from + i, sizeof own);
        found = (floats)(__builtin_convertvector(own, words) << 16);
    } else memcpy(&found, (const float *)from + i, sizeof found);
    return found;
}

INLINE floats chosen(words where, floats one, floats other) {
    return (floats)(((words)one & where) | ((words)other & ~where));
}

/* The largest; a NaN where there is one. */
INLINE float peak_of(const int bf16, const void *x, int64_t ids) {
    floats most = (floats){} - INFINITY;
    words none = {};
    for (int64_t i = 0; i < ids; i += LANES) {
        const floats own = values_at(bf16, x, i, ids);
        most = chosen((words)(own > most), own, most);
        none |= (words)(own != own);
    }
    float peak = most[0];
    uint32_t found = 0;
    for (int l = 0; l < LANES; l++) {
        found |= none[l];
        peak = most[l] > peak ? most[l] : peak;
    }
    return found ? NAN : peak;
}

/* Whether one of LANES is. */
INLINE int any_of(words where) {
    uint64_t parts[LANES / 2], found = 0;
    memcpy(parts, &where, sizeof parts);
    for (int part = 0; part < LANES / 2; part++) found |= parts[part];
    return found != 0;
}

INLINE int64_t first_of(const int bf16, const void *x, int64_t ids, float peak) {
    int64_t i = 0;
    for (; i + RUN <= ids; i += RUN) {
        words there = {};
        for (int64_t at = i; at < i + RUN; at += LANES)
            there |= (words)(values_at(bf16, x, at, ids) == peak);
        if (any_of(there)) break;
    }
    while (value_at(bf16, x, i) != peak) i++;
    return i;
}

/* The chance of each as part of the likeliest one's; colder: 1 / temperature. */
INLINE floats parts_of(floats x, float peak, float colder) {
    const floats below = (x - peak) * colder;
    const words far = (words)(below < FARTHEST);
    floats at = chosen(far, (floats){}, below),
           n = (at * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    floats r = at - n * 0.693359375f + n * 2.12194440e-4f, p = (floats){} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    typedef int32_t whole __attribute__((vector_size(4 * LANES)));
    p = p * (floats)((__builtin_convertvector(n, whole) + 127) << 23);
    return chosen(far, (floats){}, p);
}

INLINE float part_of(float x, float peak, float colder) {
    return parts_of((floats){} + x, peak, colder)[0];
}

/* Of the ids from `from` to `to` - 1. */
INLINE double run_of(const int bf16, const void *x, int64_t from, int64_t to, float peak,
                     float colder) {
    floats sums = {};
    for (int64_t i = from; i < to; i += LANES)
        sums += parts_of(values_at(bf16, x, i, to), peak, colder);
    float total = 0;
    for (int l = 0; l < LANES; l++) total += sums[l];
    return total;
}

/* Of all, run by run: `run` ids each, MOST_RUNS at most. */
INLINE double all_of(const int bf16, const void *x, int64_t ids, float peak, float colder,
                     int64_t run, double *each) {
    double total = 0;
    for (int64_t from = 0; from < ids; from += run)
        total += *each++ = run_of(bf16, x, from, from + run < ids ? from + run : ids, peak, colder);
    return total;
}

/* In the order of the ids, nothing left out. */
INLINE int64_t drawn_of_all(const int bf16, const void *x, int64_t ids, int64_t run, float peak,
                            float colder, double u) {
    double each[MOST_RUNS], before = 0, at = 0;
    const double target = u * all_of(bf16, x, ids, peak, colder, run, each);
    int64_t token = 0;
    for (int64_t from = 0; from < ids; from += run) {
        const double own = each[from / run];
        if (own > 0) token = from, at = before; /* the last of them, where rounding passes all */
        before += own;
        if (before > target) break;
    }
    const int64_t first = token;
    for (int64_t i = first; i < ids && i < first + run; i++) {
        const float part = part_of(value_at(bf16, x, i), peak, colder);
        at += part;
        if (part > 0) token = i;
        if (part > 0 && target < at) break;
    }
    return token;
}

/* Falls where x rises. */
INLINE uint32_t key_of(float x) {
    const uint32_t bits = bits_of_float(x);
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

/* Ids that are `least` at least: (key << 32) + id of each, in the order of the ids. Their number.
 */
INLINE int64_t near(const int bf16, const void *x, int64_t ids, float least, uint64_t *to) {
    int64_t count = 0;
    for (int64_t from = 0; from < ids; from += LANES) {
        const words there = (words)(values_at(bf16, x, from, ids) >= least);
        if (!any_of(there)) continue;
        for (int64_t i = from; i < ids && i < from + LANES; i++) {
            const float own = value_at(bf16, x, i);
            if (own < least) continue;
            if (to != NULL) to[count] = (uint64_t)key_of(own) << 32 | (uint64_t)i;
            count++;
        }
    }
    return count;
}

/* In their order. They lie in the order of their ids. */
static void sort(uint64_t *some, int64_t count) {
    for (int64_t i = 1; i < count; i++) {
        const uint64_t own = some[i];
        if (some[i - 1] <= own) continue; /* as good as always: few buckets hold several values */
        int64_t low = 0, high = i;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (some[middle] <= own) low = middle + 1;
            else high = middle;
        }
        memmove(some + low + 1, some + low, (size_t)(i - low) * sizeof own);
        some[low] = own;
    }
}

/* A value that at least `many` are not below, by the largest of each group; -inf: there are too few
 * groups. */
INLINE float least_of(const int bf16, const void *x, int64_t ids, int64_t group, double many,
                      float low, float peak) {
    float largest[4 * MOST_RUNS];
    int64_t groups = 0;
    for (int64_t from = 0; from < ids; from += group, groups++) {
        floats most = (floats){} - INFINITY;
        for (int64_t i = from; i < from + group && i < ids; i += LANES) {
            const floats own = values_at(bf16, x, i, ids);
            most = chosen((words)(own > most), own, most);
        }
        largest[groups] = most[0];
        for (int l = 1; l < LANES; l++)
            largest[groups] = most[l] > largest[groups] ? most[l] : largest[groups];
    }
    if (2 * many > (double)groups) return -INFINITY;
    float high = peak;
    for (int turn = 0; turn < 16; turn++) {
        const float middle = low + (high - low) / 2;
        int64_t count = 0;
        for (int64_t i = 0; i < groups; i++) count += largest[i] >= middle;
        if ((double)count >= many) low = middle;
        else high = middle;
    }
    return low;
}

/* The likeliest first, sorted as far as they are asked for. */
struct order {
    uint64_t *some, *room;
    int64_t count, known, bucket, ends[BUCKETS];
};

INLINE int bucket_of(float below, float each) {
    return below * each < BUCKETS - 1 ? (int)(below * each) : BUCKETS - 1;
}

/* Those that are `least` at least, in buckets. 0: no room. */
INLINE int listed(const int bf16, const void *x, int64_t ids, float peak, float least,
                  struct order *to) {
    to->known = to->bucket = 0;
    to->count = near(bf16, x, ids, least, NULL);
    to->room = malloc((size_t)to->count * 16);
    if (to->room == NULL) return 0;
    near(bf16, x, ids, least, to->room);
    to->some = to->room + to->count;
    float low = peak;
    int64_t before = 0;
    for (int64_t i = 0; i < to->count; i++) {
        const float own = value_at(bf16, x, (int64_t)(to->room[i] & 0xffffffffu));
        low = own < low ? own : low;
    }
    const float each = (float)(BUCKETS - 1) / (peak > low ? peak - low : 1.0f);
#define BUCKET(own) bucket_of(peak - value_at(bf16, x, (int64_t)((own) & 0xffffffffu)), each)
    memset(to->ends, 0, sizeof to->ends);
    for (int64_t i = 0; i < to->count; i++) to->ends[BUCKET(to->room[i])]++;
    for (int b = 0; b < BUCKETS; b++) {
        const int64_t own = to->ends[b];
        to->ends[b] = before;
        before += own;
    }
    for (int64_t i = 0; i < to->count; i++) to->some[to->ends[BUCKET(to->room[i])]++] = to->room[i];
#undef BUCKET
    return 1;
}

static int64_t id_at(struct order *from, int64_t place) {
    while (from->known <= place) {
        const int64_t end = from->ends[from->bucket++];
        sort(from->some + from->known, end - from->known);
        from->known = end;
    }
    return (int64_t)(from->some[place] & 0xffffffffu);
}

INLINE int64_t drawn_of_some(const int bf16, const void *x, int64_t ids, int64_t run, float peak,
                             float temperature, const struct how *how) {
    double each[MOST_RUNS];
    struct order order;
    const int by_chance = how->top_k >= (double)ids && !(how->min_p > 0);
    const float colder = 1.0f / temperature, farthest = peak + FARTHEST * temperature;
    const double all = by_chance ? all_of(bf16, x, ids, peak, colder, run, each) : 0;
    float least = how->top_k < (double)ids
                      ? least_of(bf16, x, ids, run / 4, how->top_k, farthest, peak)
                      : -INFINITY;
#define PART(i) part_of(value_at(bf16, x, id_at(&order, i)), peak, colder)
    for (int turn = least > -INFINITY; turn < 2; turn++) {
        const float far = least > -INFINITY ? least : turn ? farthest : peak + NEAR * temperature;
        if (!listed(bf16, x, ids, peak, far > -INFINITY ? far : -FLT_MAX, &order)) return NO_ROOM;
        if (turn || (how->min_p > 4e-4) || (!by_chance && (double)order.count >= how->top_k))
            break; /* e^-8 is 3.4e-4 */
        double reach = 0;
        for (int64_t i = 0; by_chance && i < order.count && reach < how->top_p * all; i++)
            reach += PART(i);
        if (by_chance && reach >= how->top_p * all) break;
        free(order.room);
    }
    int64_t kept = 0, left = 0, last = 0;
    double total = all, end = 0, at = 0;
    for (; !by_chance && kept < order.count && (double)kept < how->top_k; kept++) {
        const float part = PART(kept);
        if (kept > 0 && part < how->min_p) break;
        total += part;
    }
    if (by_chance) kept = order.count;
    for (; left < kept && (left == 0 || how->top_p >= 1 || end < how->top_p * total); left++)
        end += PART(left);
    for (; last < left; last++) {
        at += PART(last);
        if (how->u * end < at) break;
    }
    const int64_t token = id_at(&order, last < left ? last : left - 1);
#undef PART
    free(order.room);
    return token;
}

INLINE void draw_rows(const int bf16, const struct draw *a, int64_t from, int64_t to) {
    const int64_t run = (a->ids / MOST_RUNS / RUN + 1) * RUN;
    for (int64_t row = from; row < to; row++) {
        const void *x = (const char *)a->logits + row * a->stride * (bf16 ? 2 : 4);
        const struct how *how = a->how + row;
        const float peak = peak_of(bf16, x, a->ids), temperature = (float)how->temperature;
        const int cut = how->top_k < (double)a->ids || how->top_p < 1 || how->min_p > 0;
        if (peak == -INFINITY) a->tokens[row] = NO_TOKEN;
        else if (!(peak < INFINITY)) a->tokens[row] = BROKEN;
        else if (!(temperature > 0)) a->tokens[row] = first_of(bf16, x, a->ids, peak);
        else if (cut) a->tokens[row] = drawn_of_some(bf16, x, a->ids, run, peak, temperature, how);
        else a->tokens[row] = drawn_of_all(bf16, x, a->ids, run, peak, 1.0f / temperature, how->u);
    }
}

LOOPS(draw_floats, draw_rows(0, a, from, to))
LOOPS(draw_bf16, draw_rows(1, a, from, to))

/* most: caps the instructions (3, 2, 0), for tests. */
void veneer_draw(struct draw *a, int64_t rows, int bf16, int most) {
    const int own = veneer_level(), level = most < own ? most : own;
    veneer_parallel(bf16 ? LOOP_OF(draw_bf16, level) : LOOP_OF(draw_floats, level), a, rows, 1);
}
