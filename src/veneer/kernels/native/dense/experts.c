/* The experts of a decoding step: which experts a row has, its rows sorted by expert, products with
   a stack of matrices, and the sums of each row's outputs. kernels/decoding/expert_step.py says
   what is computed. What a row gives depends neither on the rows beside it nor on their experts. */
#include "factors.h"
#include "nf4.h"
#include "updates.h"
#include <math.h>
#include <stddef.h>
#include <stdlib.h>

enum { MOST_EXPERTS = 1024 }; /* kernels/bindings/expert_calls.py knows it too */
enum { FUSED_ROWS = 6 };      /* kernels/packed/nf4.py knows it too */

/* logits (rows, experts) -> the `chosen` experts of each row with the largest ones, in their order,
   and the weights softmax(logits) of these. is_normal: they are divided by their sum. wide: weights
   are float32 beside bf16 logits. */
struct expert_route {
    const void *logits;
    int64_t *index;
    void *weights;
    int64_t rows, experts, chosen, is_normal, wide;
    int type;
};

/* layout: of each of the rows * chosen sorted rows its place among the choices, then its expert;
   then of each choice its sorted row. sorted: rows of x, by expert and then in their order. */
struct expert_sort {
    const char *x;
    const int64_t *index;
    int64_t *layout;
    char *sorted;
    int64_t rows, chosen, experts, row_bytes;
};

/* x and y (rows, ...) are sorted rows. part: w (experts, outs, width) and bias (experts, outs) of
   all experts; updates of rows before they are sorted, whose factors are those of expert 0: the
   other experts' lie behind them, one after the other. down: as in updates.h. packed: NULL, or
   takes the place of w. */
struct expert_product {
    const void *x;
    void *down;
    const struct few_rows_updated_part *parts;
    const struct nf4_weights *packed;
    const int64_t *layout;
    int64_t rows, width, chosen;
    int type;
};

/* out (rows, width) = sums of weights (rows, chosen) * y, which is sorted. */
struct expert_sum {
    const void *y, *weights;
    const int64_t *layout;
    void *out;
    int64_t rows, chosen, width, wide;
    int type;
};

INLINE float float_at(const void *from, int64_t at, int type) {
    if (type == FEW_FP32) return ((const float *)from)[at];
    return float_of_bits((uint32_t)((const uint16_t *)from)[at] << 16);
}

INLINE void put_float(void *to, int64_t at, float value, int type) {
    if (type == FEW_FP32) ((float *)to)[at] = value;
    else ((uint16_t *)to)[at] = bf16_of_float(value);
}

void veneer_expert_route(const struct expert_route *a) {
    const int of_weights = a->wide ? FEW_FP32 : a->type;
    for (int64_t row = 0; row < a->rows; row++) {
        int64_t *index = a->index + row * a->chosen, found = 0;
        const int64_t first = row * a->experts;
        for (int64_t e = 0; e < a->experts; e++) {
            const float own = float_at(a->logits, first + e, a->type);
            int64_t place = found;
            while (place > 0 && own > float_at(a->logits, first + index[place - 1], a->type))
                place--;
            if (place == a->chosen) continue;
            if (found < a->chosen) found++;
            for (int64_t i = found - 1; i > place; i--) index[i] = index[i - 1];
            index[place] = e;
        }
        const float most = float_at(a->logits, first + index[0], a->type);
        float sum = 0, of_chosen = 0;
        for (int64_t e = 0; e < a->experts; e++)
            sum += expf(float_at(a->logits, first + e, a->type) - most);
        for (int64_t i = 0; i < a->chosen; i++)
            of_chosen += expf(float_at(a->logits, first + index[i], a->type) - most);
        for (int64_t i = 0; i < a->chosen; i++)
            put_float(a->weights, row * a->chosen + i,
                      expf(float_at(a->logits, first + index[i], a->type) - most) /
                          (a->is_normal ? of_chosen : sum),
                      of_weights);
    }
}

void veneer_expert_sort(const struct expert_sort *a) {
    const int64_t size = a->rows * a->chosen;
    int64_t next[MOST_EXPERTS] = {0}, before = 0, *experts = a->layout + size;
    for (int64_t i = 0; i < size; i++) next[a->index[i]]++;
    for (int64_t e = 0; e < a->experts; e++) {
        const int64_t count = next[e];
        next[e] = before, before += count;
    }
    for (int64_t i = 0; i < size; i++) {
        const int64_t place = next[a->index[i]]++;
        a->layout[place] = i, experts[place] = a->index[i], experts[size + i] = place;
        memcpy(a->sorted + place * a->row_bytes, a->x + i / a->chosen * a->row_bytes,
               (size_t)a->row_bytes);
    }
}

/* Bytes from the factors of an expert to those of the next one. B lies behind A. */
static int64_t factor_bytes(const struct expert_product *a, int64_t rank) {
    const int64_t words = filled_rank(rank) * filled_words(a->type, a->width) +
                          blocks_of(a->parts->outs) * UPDATE_BLOCK * words_of(a->type, rank);
    return 4 * words;
}

/* Of the sorted rows [first, last) of an expert, the first that is row `row` of the step or comes
 * behind it. */
static int64_t row_from(const struct expert_product *a, int64_t first, int64_t last, int64_t row) {
    while (first < last && a->layout[first] / a->chosen < row) first++;
    return first;
}

/* The updates of the sorted rows [first, last), of one expert. */
static int64_t updates_of(const struct expert_product *a, int64_t first, int64_t last,
                          struct few_rows_update *to) {
    const int64_t expert = a->layout[a->rows + first];
    int64_t count = 0;
    for (const struct few_rows_update *u = a->parts->updates;
         u < a->parts->updates + a->parts->count; u++) {
        const int64_t begin = row_from(a, first, last, u->first),
                      end = row_from(a, begin, last, u->first + u->rows);
        if (begin == end) continue;
        const int64_t behind = expert * factor_bytes(a, u->rank);
        to[count] = *u;
        to[count].A = (const char *)u->A + behind, to[count].B = (const char *)u->B + behind;
        to[count].first = begin, to[count++].rows = end - begin;
    }
    return count;
}

int veneer_nf4_product(const struct nf4_weights *, int64_t, int64_t, int64_t, const void *, int64_t,
                       const void *, void *, int, int);

/* A matrix of packed ones: its first element. */
struct packed_matrix {
    const struct expert_product *of;
    int64_t start;
    int level;
};

static void decode_rows(const void *packed, int64_t first, int64_t count, void *out) {
    const struct packed_matrix *m = packed;
    const int64_t width = m->of->width;
    nf4_decode(m->of->packed, m->start + first * width, count * width, out, m->of->type, m->level);
}

/* What the parts add to y, which then hold updates alone. By the number of the step's rows, as
   products with a packed W are computed: a row's bits do not depend on its neighbours' experts. */
static int multiply_packed(const struct expert_product *a, struct few_rows_updated_part *parts,
                           int64_t groups, int most) {
    const int64_t size = a->type == FEW_FP32 ? 4 : 2, outs = a->parts->outs;
    struct piece *pieces = malloc((size_t)groups * (sizeof *pieces + sizeof(struct packed_matrix)));
    if (pieces == NULL) return 1;
    struct packed_matrix *matrix = (struct packed_matrix *)(pieces + groups);
    int failed = 0, fused = a->rows <= FUSED_ROWS * a->chosen;
    for (int64_t i = 0; i < groups; i++) {
        struct few_rows_updated_part *part = parts + i;
        const int64_t start = a->layout[a->rows + part->first] * outs * a->width;
        const char *x = (const char *)a->x + part->first * a->width * size;
        char *y = (char *)part->y + part->first * outs * size;
        matrix[i] = (struct packed_matrix){a, start, nf4_level(most)};
        pieces[i] = (struct piece){x,        matrix + i, part->bias, y,           part->rows,
                                   a->width, outs,       a->width,   decode_rows, 0};
        if (fused)
            failed |= veneer_nf4_product(a->packed, start, outs, a->width, x, part->rows,
                                         part->bias, y, a->type, most);
        part->w = NULL;
    }
    if (!fused) failed = veneer_pieces(pieces, groups, a->type, most, NULL);
    free(pieces);
    return failed;
}

/* 1: no memory. */
int veneer_expert_product(const struct expert_product *a, int most) {
    const struct few_rows_updated_part *all = a->parts;
    const int64_t *experts = a->layout + a->rows, size = a->type == FEW_FP32 ? 4 : 2,
                  matrix = all->outs * a->width * (all->narrow ? 2 : size);
    int64_t groups = 0, stop;
    for (int64_t row = 0; row < a->rows; row++)
        groups += row == 0 || experts[row] != experts[row - 1];
    struct few_rows_updated_part *parts =
        malloc((size_t)groups * (sizeof *parts + (size_t)all->count * sizeof *all->updates));
    if (parts == NULL) return 1;
    struct few_rows_updated_part *part = parts;
    struct few_rows_update *updates = (struct few_rows_update *)(parts + groups);
    for (int64_t row = 0; row < a->rows; row = stop, part++) {
        for (stop = row + 1; stop < a->rows && experts[stop] == experts[row];) stop++;
        *part = *all;
        if (all->w != NULL) part->w = (const char *)all->w + experts[row] * matrix;
        if (all->bias != NULL)
            part->bias = (const char *)all->bias + experts[row] * all->outs * size;
        part->first = row, part->rows = stop - row, part->updates = updates;
        part->count = updates_of(a, row, stop, updates), updates += part->count;
    }
    const struct few_rows_updated call = {a->x,    a->down,  parts,    groups,
                                          a->rows, a->width, a->width, a->type};
    const int failed = (a->packed != NULL && multiply_packed(a, parts, groups, most)) ||
                       veneer_few_rows_updated(&call, most);
    free(parts);
    return failed;
}

INLINE void sum_rows(const int type, const struct expert_sum *a, int64_t from, int64_t to) {
    const int64_t *places = a->layout + 2 * a->rows * a->chosen;
    for (int64_t row = from; row < to; row++)
        for (int64_t i = 0; i < a->width; i++) {
            float sum = 0;
            for (int64_t k = row * a->chosen; k < (row + 1) * a->chosen; k++)
                sum += float_at(a->weights, k, a->wide ? FEW_FP32 : type) *
                       float_at(a->y, places[k] * a->width + i, type);
            put_float(a->out, row * a->width + i, sum, type);
        }
}

LOOPS(sum_floats, sum_rows(FEW_FP32, a, from, to))
LOOPS(sum_halves, sum_rows(FEW_BF16, a, from, to))

void veneer_expert_sum(struct expert_sum *a) {
    const int level = veneer_level();
    veneer_parallel(a->type == FEW_FP32 ? LOOP_OF(sum_floats, level) : LOOP_OF(sum_halves, level),
                    a, a->rows, (1 << 16) / (a->width * a->chosen) + 1);
}
