/* Included by updates.c once for each set of instructions: NAME(x) gives the functions their names, TARGET their compiler
   option; at most ROWS rows go together. MULTIPLY adds products of a word with words to sums. */

INLINE TARGET void NAME(tile)(const struct up *up, const int type, const int rows, const uint32_t *soon, int64_t first, int64_t block) {
    const uint32_t *B = up->B + block * up->words * BLOCK, *down = up->down + first * up->words;
    f16v sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < up->words; k++, B += BLOCK) {
        u16v b[VECTORS];
        memcpy(b, B, sizeof b);
        if (soon != NULL)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) __builtin_prefetch(soon + k * BLOCK + 16 * v);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const uint32_t a = down[m * up->words + k];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[m][v] = MULTIPLY(sums[m][v], a, b[v], type);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) add_sums(up, type, first + m, BLOCK * block + 16 * v, sums[m][v]);
}

/* soon: what will be read, as far as these words reach. */
INLINE TARGET void NAME(block)(const struct up *up, const int type, const uint32_t *soon, int64_t block) {
    int64_t first = 0;
    for (; first + ROWS <= up->rows; first += ROWS) NAME(tile)(up, type, ROWS, first ? NULL : soon, first, block);
    for (; first < up->rows; first++) NAME(tile)(up, type, 1, first ? NULL : soon, first, block);
}

/* The blocks whose costs begin within [start, stop), all of them in a row. */
static TARGET void NAME(add)(void *arguments, int64_t start, int64_t stop) {
    const struct ups *all = arguments;
    int64_t before = 0;
    for (const struct up *up = all->of; up < all->of + all->count && before < stop; up++) {
        const int64_t cost = cost_of(up), blocks = blocks_of(up);
        int64_t block = start <= before ? 0 : (start - before + cost - 1) / cost;
        for (; block < blocks && before + block * cost < stop; block++) {
            const uint32_t *soon = soon_read(all, up, block);
            if (all->type == FEW_FP32) NAME(block)(up, FEW_FP32, soon, block);
            else NAME(block)(up, FEW_BF16, soon, block);
        }
        before += blocks * cost;
    }
}

#undef NAME
#undef TARGET
#undef ROWS
#undef MULTIPLY
