/* Included by updates.c once for each set of instructions: NAME(x) gives the functions their names,
   TARGET their compiler option; at most ROWS rows go together. MULTIPLY adds products of a word
   with words to sums. */

/* Ranks of a group, `lanes` of them, for `rows` rows of x. */
INLINE TARGET void NAME(down_tile)(const struct update *u, const int type, const int rows,
                                   const int lanes, int64_t first, int64_t group,
                                   struct ahead *soon) {
    const int size = type == FEW_FP32 ? 4 : 2;
    const int64_t apart = u->apart * size, whole = u->width * size / 4;
    const uint32_t *A = u->A + group * LANES * filled_words(type, u->width);
    const char *x = u->x + first * apart;
    f16v sums[ROWS][CHAINS] = {};
    int64_t k = 0;
    for (; k + CHAINS <= whole; k += CHAINS) {
        if (soon != NULL && k % STEP == 0) bring(soon, lanes);
        UNROLLED(4, c, CHAINS) {
            u16v a = {};
            memcpy(&a, A + (k + c) * lanes, 4 * (size_t)lanes);
            UNROLLED(4, m, rows)
                sums[m][c] = MULTIPLY(sums[m][c], word_at(x + m * apart + 4 * (k + c), 4), a, type);
        }
    }
    UNROLLED(4, c, CHAINS) {
        const int64_t left = u->width * size - 4 * (k + c);
        if (left <= 0) break;
        u16v a = {};
        memcpy(&a, A + (k + c) * lanes, 4 * (size_t)lanes);
        UNROLLED(4, m, rows) {
            const char *at = x + m * apart + 4 * (k + c);
            sums[m][c] = MULTIPLY(sums[m][c], left < 4 ? word_at(at, 2) : word_at(at, 4), a, type);
        }
    }
    UNROLLED(4, m, rows) {
        const f16v total = (sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3]);
        put_some(u->down + ((first + m) * u->rank + group * LANES) * size, total,
                 u->rank - group * LANES, type);
    }
}

INLINE TARGET void NAME(down_rows)(const struct update *u, const int type, const int rows,
                                   int64_t first, struct ahead *soon) {
    for (int64_t group = 0; group < groups_of(u->rank); group++) {
        if (lanes_of(u->rank, group) == LANES)
            NAME(down_tile)(u, type, rows, LANES, first, group, soon);
        else NAME(down_tile)(u, type, rows, HALF, first, group, soon);
    }
}

INLINE TARGET void NAME(downs_of)(const struct update *u, const int type, struct ahead *soon) {
    int64_t first = 0;
    for (; first + ROWS <= u->rows; first += ROWS)
        NAME(down_rows)(u, type, ROWS, first, first ? NULL : soon);
    for (; first < u->rows; first++) NAME(down_rows)(u, type, 1, first, first ? NULL : soon);
}

static TARGET void NAME(downs)(const struct update *u, int64_t count, struct ahead *soon) {
    for (int64_t i = 0; i < count; i++) {
        if (soon->type == FEW_FP32) NAME(downs_of)(u + i, FEW_FP32, soon);
        else NAME(downs_of)(u + i, FEW_BF16, soon);
    }
}

INLINE TARGET void NAME(up_tile)(const struct update *u, const int type, const int rows,
                                 int64_t first, int64_t block) {
    const int64_t words = words_of(type, u->rank);
    const uint32_t *B = u->B + block * words * UPDATE_BLOCK,
                   *down = (const uint32_t *)u->down + first * words;
    f16v sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < words; k++, B += UPDATE_BLOCK) {
        u16v b[VECTORS];
        memcpy(b, B, sizeof b);
        UNROLLED(4, m, rows) {
            const uint32_t a = down[m * words + k];
            UNROLLED(4, v, VECTORS) sums[m][v] = MULTIPLY(sums[m][v], a, b[v], type);
        }
    }
    UNROLLED(4, m, rows)
        UNROLLED(4, v, VECTORS)
            add_sums(u, type, first + m, UPDATE_BLOCK * block + 16 * v, sums[m][v]);
}

INLINE TARGET void NAME(ups_of)(const struct update *u, const int type, int64_t start, int64_t stop,
                                struct ahead *soon) {
    for (int64_t block = start; block < stop; block++) {
        int64_t first = 0;
        bring(soon, 4 * words_of(type, u->rank));
        for (; first + ROWS <= u->rows; first += ROWS) NAME(up_tile)(u, type, ROWS, first, block);
        for (; first < u->rows; first++) NAME(up_tile)(u, type, 1, first, block);
    }
}

static TARGET void NAME(ups)(const struct update *u, int64_t count, int64_t start, int64_t stop,
                             struct ahead *soon) {
    for (int64_t i = 0; i < count; i++) {
        if (soon->type == FEW_FP32) NAME(ups_of)(u + i, FEW_FP32, start, stop, soon);
        else NAME(ups_of)(u + i, FEW_BF16, start, stop, soon);
    }
}

#undef NAME
#undef TARGET
#undef ROWS
#undef MULTIPLY
