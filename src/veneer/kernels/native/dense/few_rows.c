/* y = x W^T + bias for a few rows of x and dense W, each read once: for decoding, where the time is
   that of reading W. Several W may share one x. few_rows_body.h holds the code, written once; it is
   compiled here for each set of instructions and chosen when called.

   W is asked for in the order in which it lies, line by line, some KiB ahead and into the second
   cache: four rows side by side are streams too short for what a processor asks for by itself (Zen
   4, one thread: 12 GB/s, and 20 so), and the nearest cache waits for few lines at a time.

   A sum stays in one register from the first value to the last, in their order, and its lanes are
   added up in one fixed order (of tiles: few_rows_tiles.c): what a row gives depends neither on the
   rows beside it nor on the number of threads. */
#include "few_rows.h"
#include <stddef.h>
#include <stdlib.h>

enum { NEAR = 1 << 14, FAR = 1 << 18, AHEAD = 1 << 13, LINE = 64, GROUPED = 7 }; /* bytes; rows */
enum { SECOND = 2 }; /* the second cache, to the compiler */
enum { LATER = 4 };  /* lines a step, of what is read behind */

/* room: bytes for a group of rows of a packed W; 0 where none is. reads, lines: of what is behind,
 * by `threads` threads. */
struct pieces {
    const struct piece *of;
    int64_t count, room;
    int type, failed;
    const struct stretch *reads;
    int64_t lines, cost, threads;
};

/* Four rows of W at a time. Threads share work by what a block costs: W is read, then multiplied
 * with each row. */
INLINE int64_t blocks_of(const struct piece *part) { return (part->outs + 3) / 4; }
INLINE int64_t cost_of(const struct piece *part) { return part->rows + 3; }

/* Those whose costs begin within [start, stop), where the part's begin at `before`. */
INLINE void blocks_within(const struct piece *part, int64_t before, int64_t start, int64_t stop,
                          int64_t *begin, int64_t *end) {
    const int64_t cost = cost_of(part), blocks = blocks_of(part);
    *begin = start <= before ? 0 : (start - before + cost - 1) / cost;
    *end = stop - before >= blocks * cost ? blocks : (stop - before + cost - 1) / cost;
}

INLINE int type_of(const struct pieces *all, const struct piece *part) {
    return part->narrow ? FEW_WIDENED : all->type;
}

INLINE int64_t row_bytes(const struct pieces *all, const struct piece *part) {
    return part->width * few_bytes(type_of_weight(type_of(all, part)));
}

/* Blocks of W that the nearest cache has room for beside a few rows of x, where more than these go
 * by. */
INLINE int64_t group_of(const struct pieces *all, const struct piece *part) {
    const int64_t fit = NEAR / (4 * row_bytes(all, part));
    return part->rows < GROUPED || fit < 1 ? 1 : fit;
}

/* Rows of x that the second cache has room for. */
INLINE int64_t rows_of(const struct pieces *all, const struct piece *part) {
    const int64_t fit = FAR / (part->width * few_bytes(all->type));
    return fit < GROUPED ? GROUPED : fit;
}

/* What lies `place` bytes behind the beginning of W: in the next piece, where this one ends before.
 */
INLINE const char *soon_read(const struct pieces *all, const struct piece *part, int64_t place) {
    const int64_t bytes = part->outs * row_bytes(all, part);
    if (place < bytes || part + 1 == all->of + all->count) return (const char *)part->w + place;
    return (const char *)part[1].w + (place - bytes);
}

/* For what a run of a thread begins with: later lines are asked for while earlier ones are
 * multiplied. */
INLINE void fetch_first(const struct piece *part, int64_t place, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE)
        __builtin_prefetch((const char *)part->w + place + i, 0, SECOND);
}

/* What a run of a thread asks for that is read behind the product: `lines` lines from line `from`
   of `at` on, by the turns over `blocks` blocks of W. While many rows are multiplied memory has
   nothing else to do, once W itself is there. */
struct later {
    const struct stretch *at;
    int64_t from, lines, blocks;
};

/* Of the N-th of the lines that a thread is going to read, what belongs to its run: it takes one
 * run of N. */
INLINE struct later later_of(const struct pieces *all, int64_t start, int64_t stop) {
    struct later later = {all->reads, 0, 0, 0};
    int64_t before = 0, begin, end;
    if (all->lines == 0) return later;
    for (const struct piece *part = all->of; part < all->of + all->count && before < stop; part++) {
        blocks_within(part, before, start, stop, &begin, &end);
        before += blocks_of(part) * cost_of(part), later.blocks += end > begin ? end - begin : 0;
    }
    const int64_t thread = veneer_thread(), first = all->lines * thread / all->threads,
                  last = all->lines * (thread + 1) / all->threads;
    if (later.blocks == 0 || first >= last || thread >= all->threads) return later;
    const int64_t turn = (start + stop) / 2 * TURNS / all->cost;
    later.from = first + (last - first) * turn / TURNS;
    later.lines = first + (last - first) * (turn + 1) / TURNS - later.from;
    for (; later.from >= later.at->lines; later.at++) later.from -= later.at->lines;
    return later;
}

/* What a turn over a block asks for: `each` lines in each of its steps, from what is given back on.
   idle: turns over it in which no W is asked for; 0: this is none. */
INLINE const char *next_of(struct later *later, int64_t steps, int64_t idle, int last,
                           int64_t *each) {
    *each = 0;
    if (later->lines <= 0) return NULL;
    const int64_t wanted =
        later->blocks > 0 ? (later->lines + later->blocks - 1) / later->blocks : 0;
    *each = idle ? (wanted + idle * steps - 1) / (idle * steps) : wanted > LATER * steps;
    if (*each > LATER) *each = LATER;
    later->blocks -= last;
    if (*each == 0) return NULL;
    const char *found = later->at->at + later->from * LINE;
    const int64_t left = later->at->lines - later->from,
                  some = *each * steps < left ? *each * steps : left;
    later->from += some, later->lines -= some;
    if (some == left) later->at++, later->from = 0;
    return found;
}

/* The totals of one row of x to values [out, out + count) of a row of y, 4 of them or fewer. */
INLINE void store_totals(const struct piece *part, const int type, int64_t row, int64_t out,
                         int64_t count, f4v totals) {
    const int size = type == FEW_FP32 ? 4 : 2;
    if (part->bias != NULL) {
        const char *bias = (const char *)part->bias + out * size;
        totals += count == 4 ? some_floats(bias, 4, type) : some_floats(bias, count, type);
    }
    put_floats((char *)part->y + (row * part->outs + out) * size, totals, count, type);
}

#if defined(__x86_64__)
#include "totals.h"

/* store_totals of four rows of x at once, each with four rows of W: the same bits. */
INLINE FOR_AVX512 void store_rows_512(const struct piece *part, const int type, int64_t row,
                                      int64_t out, __m512 (*sums)[4]) {
    __m512 of[4], halves[2];
    UNROLLED(4, m, 4) of[m] = quarters_512(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
    UNROLLED(2, i, 2)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(of[2 * i], of[2 * i + 1], 0x44),
                                  _mm512_shuffle_f32x4(of[2 * i], of[2 * i + 1], 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                               _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
    const int size = type == FEW_FP32 ? 4 : 2;
    const int64_t apart = part->outs * size;
    char *y = (char *)part->y + (row * part->outs + out) * size;
    if (part->bias != NULL)
        all = _mm512_add_ps(all, _mm512_broadcast_f32x4((__m128)some_floats(
                                     (const char *)part->bias + out * size, 4, type)));
    if (type == FEW_FP32) {
        _mm_storeu_ps((float *)y, _mm512_castps512_ps128(all));
        _mm_storeu_ps((float *)(y + apart), _mm512_extractf32x4_ps(all, 1));
        _mm_storeu_ps((float *)(y + 2 * apart), _mm512_extractf32x4_ps(all, 2));
        _mm_storeu_ps((float *)(y + 3 * apart), _mm512_extractf32x4_ps(all, 3));
        return;
    }
    __m512i bits = _mm512_castps_si512(all),
            odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m256i packed = _mm512_cvtepi32_epi16(bits);
    const __m128i low = _mm256_castsi256_si128(packed), high = _mm256_extracti128_si256(packed, 1);
    _mm_storel_epi64((__m128i *)y, low);
    _mm_storel_epi64((__m128i *)(y + apart), _mm_unpackhi_epi64(low, low));
    _mm_storel_epi64((__m128i *)(y + 2 * apart), high);
    _mm_storel_epi64((__m128i *)(y + 3 * apart), _mm_unpackhi_epi64(high, high));
}

INLINE FOR_AVX512 __m512 floats_512(const char *p, int type) {
    if (type == FEW_FP32) return _mm512_loadu_ps(p);
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE FOR_AVX512 __m512 some_512(const char *p, int64_t count, int type) {
    __mmask16 mask = (__mmask16)((1u << count) - 1);
    if (type == FEW_FP32) return _mm512_maskz_loadu_ps(mask, p);
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

INLINE FOR_AVX2 __m256 floats_256(const char *p, int type) {
    if (type == FEW_FP32) return _mm256_loadu_ps((const float *)p);
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

INLINE FOR_AVX2 __m256 some_256(const char *p, int64_t count, int type) {
    char own[32] = {0};
    memcpy(own, p, (size_t)(count * (type == FEW_FP32 ? 4 : 2)));
    return floats_256(own, type);
}

/* bf16 pairs, multiplied as they lie */
#define PAIRS
#define NAME(x) x##_pairs
#define TARGET FOR_AVX512_BF16
#define VALUES 32
#define MOST 6
typedef __m512i value_pairs;
typedef __m512 sum_pairs;
#define LOAD(p, type) _mm512_loadu_si512(p)
#define LOAD_SOME(p, count, type)                                                                  \
    _mm512_maskz_loadu_epi16((__mmask32)(((uint32_t)1 << (count)) - 1), p)
#define MULTIPLY(sum, x, w) _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(w))
#define TOTAL total_512
#define STORE_ROWS store_rows_512
#include "few_rows_body.h"

#define NAME(x) x##_avx512
#define TARGET FOR_AVX512
#define VALUES 16
#define MOST 6
#define TOTAL total_512
#define STORE_ROWS store_rows_512
typedef __m512 value_avx512, sum_avx512;
#define LOAD floats_512
#define LOAD_SOME some_512
#define MULTIPLY(sum, x, w) _mm512_fmadd_ps(x, w, sum)
#include "few_rows_body.h"

#define NAME(x) x##_avx2
#define TARGET FOR_AVX2
#define VALUES 8
#define MOST 3
typedef __m256 value_avx2, sum_avx2;
#define LOAD floats_256
#define LOAD_SOME some_256
#define MULTIPLY(sum, x, w) _mm256_fmadd_ps(x, w, sum)
#define TOTAL total_256
#include "few_rows_body.h"
#endif

INLINE f4v total_128(f4v a, f4v b, f4v c, f4v d) {
    f4v sums[4] = {a, b, c, d}, all;
    for (int r = 0; r < 4; r++) all[r] = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
    return all;
}

#if defined(__aarch64__)
#define MOST_PLAIN 6 /* 32 registers */

/* bf16 pairs, multiplied as they lie */
typedef bfloat16x8_t value_pairs;
typedef float32x4_t sum_pairs;

INLINE value_pairs some_halves(const char *from, int64_t count) {
    uint16_t halves[8] = {0};
    memcpy(halves, from, (size_t)(2 * count));
    return vreinterpretq_bf16_u16(vld1q_u16(halves));
}

#define PAIRS
#define NAME(x) x##_pairs
#define TARGET FOR_BFDOT
#define VALUES 8
#define MOST MOST_PLAIN
#define LOAD(p, type) vreinterpretq_bf16_u16(vld1q_u16((const uint16_t *)(p)))
#define LOAD_SOME(p, count, type) some_halves(p, count)
#define MULTIPLY(sum, x, w) vbfdotq_f32(sum, x, w)
#define TOTAL(a, b, c, d) total_128((f4v)(a), (f4v)(b), (f4v)(c), (f4v)(d))
#include "few_rows_body.h"
#else
#define MOST_PLAIN 2
#endif

#define NAME(x) x##_plain
#define TARGET
#define VALUES 4
#define MOST MOST_PLAIN
typedef f4v value_plain, sum_plain;
#define LOAD(p, type) some_floats(p, 4, type)
#define LOAD_SOME some_floats
#define MULTIPLY(sum, x, w) ((f4v)FUSED_128(x, w, sum))
#define TOTAL total_128
#include "few_rows_body.h"

int veneer_has_bf16(void);
int veneer_has_bfdot(void);
int veneer_has_amx(void);

int veneer_few_level(int type, int most) {
    int level = veneer_level();
    if (level == 3 && veneer_has_bf16()) level = veneer_has_amx() ? 5 : 4;
    if (most < level) level = most;
    return level >= 4 && type != FEW_BF16 ? 3 : level;
}

int veneer_pieces(const struct piece *of, int64_t count, int type, int most,
                  struct behind *behind) {
    const int level = veneer_few_level(type, most);
    if (level == 5) return veneer_tiled_pieces(of, count, behind);
    struct pieces all = {of, count, 0, type, 0, NULL, 0, 0, veneer_threads()};
    int64_t cost = 0, worth = 0;
    if (behind != NULL) all.reads = behind->reads, all.lines = behind->lines;
    for (int64_t i = 0; i < count; i++) {
        const int64_t four = 4 * row_bytes(&all, of + i);
        cost += blocks_of(of + i) * cost_of(of + i),
            worth += of[i].outs * of[i].width * (1 + of[i].rows / 16);
        if (of[i].decode != NULL && four * group_of(&all, of + i) > all.room)
            all.room = four * group_of(&all, of + i);
    }
    all.cost = cost;
    veneer_body body = few_rows_plain;
#if defined(__x86_64__)
    if (level == 4) body = few_rows_pairs;
    else if (level == 3) body = few_rows_avx512;
    else if (level == 2) body = few_rows_avx2;
#elif defined(__aarch64__)
    if (type == FEW_BF16 && most >= 4 && veneer_has_bfdot()) body = few_rows_pairs;
#else
    (void)level;
#endif
    veneer_parallel_behind(body, &all, cost, cost * ALONE / (worth + 1) + 1, TURNS, behind);
    return all.failed;
}

enum { MOST_PARTS = 16 }; /* kernels/bindings/dense_calls.py knows it too */

struct few_rows_part {
    const void *w, *bias;
    void *y;
    int64_t outs, narrow;
};

/* x (rows, width); y (rows, outs) of each of the `count` parts. */
struct few_rows {
    const void *x;
    const struct few_rows_part *parts;
    int64_t count, rows, width, apart;
    int type;
};

/* 1: no memory for x on tiles. */
int veneer_few_rows(const struct few_rows *call, int most) {
    struct piece of[MOST_PARTS];
    for (int64_t i = 0; i < call->count; i++) {
        const struct few_rows_part *part = call->parts + i;
        of[i] = (struct piece){call->x,     part->w,    part->bias,  part->y, call->rows,
                               call->width, part->outs, call->apart, NULL,    part->narrow};
    }
    return veneer_pieces(of, call->count, call->type, most, NULL);
}
