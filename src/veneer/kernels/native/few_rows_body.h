/* Included by few_rows.c once for each set of instructions: NAME(x) gives the functions their names, TARGET their
   compiler option. A register holds LANES sums, and VALUES values of x or of W; at most MOST rows of x go together.
   LOAD and LOAD_SOME read a register, the second the first few values and zeros behind them; MULTIPLY adds products to
   sums, TOTAL adds up the lanes of four of them. */

/* Four rows of W against `rows` rows of x from `first` on. ahead: fetch what the next four rows hold. */
INLINE TARGET void NAME(tile)(const struct few_rows *a, const struct few_rows_part *part, const int type, const int rows,
                              const int ahead, int64_t first, int64_t out) {
    const int size = type == FEW_FP32 ? 4 : 2;
    const int64_t left = part->outs - out, step = a->width * size, apart = a->apart * size;
    const char *x = (const char *)a->x + first * apart, *w[4];
    for (int r = 0; r < 4; r++) w[r] = (const char *)part->w + (out + (r < left ? r : left - 1)) * step; /* none behind the last */
    NAME(sum) sums[MOST][4] = {};
    int64_t k = 0;
    for (; k + VALUES <= a->width; k += VALUES) {
        NAME(value) of_w[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            of_w[r] = LOAD(w[r] + k * size, type);
            if (ahead) __builtin_prefetch(w[r] + 4 * step + k * size);
        }
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            NAME(value) of_x = LOAD(x + m * apart + k * size, type);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) sums[m][r] = MULTIPLY(sums[m][r], of_x, of_w[r]);
        }
    }
    if (k < a->width) {
        const int64_t some = a->width - k;
        NAME(value) of_w[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) of_w[r] = LOAD_SOME(w[r] + k * size, some, type);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            NAME(value) of_x = LOAD_SOME(x + m * apart + k * size, some, type);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) sums[m][r] = MULTIPLY(sums[m][r], of_x, of_w[r]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
        few_rows_store(part, type, first + m, out, left < 4 ? left : 4, TOTAL(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
}

#define TILE(ROWS, AHEAD) NAME(tile)(a, part, type, ROWS, AHEAD, first, out)
#if MOST == 6
#define UP_TO_MOST(rows, ahead)              \
    switch (rows) {                          \
    case 1: TILE(1, ahead); break;           \
    case 2: TILE(2, ahead); break;           \
    case 3: TILE(3, ahead); break;           \
    case 4: TILE(4, ahead); break;           \
    case 5: TILE(5, ahead); break;           \
    default: TILE(6, ahead);                 \
    }
#else
#define UP_TO_MOST(rows, ahead)              \
    switch (rows) {                          \
    case 1: TILE(1, ahead); break;           \
    default: TILE(2, ahead);                 \
    }
#endif

/* All rows of x, near enough equally many at a time. */
INLINE TARGET void NAME(four)(const struct few_rows *a, const struct few_rows_part *part, const int type, int64_t out) {
    const int64_t turns = (a->rows + MOST - 1) / MOST;
    for (int64_t turn = 0, first = 0; turn < turns; turn++) {
        int64_t next = a->rows * (turn + 1) / turns;
        if (turn == 0) UP_TO_MOST(next - first, 1) else UP_TO_MOST(next - first, 0)
        first = next;
    }
}

static TARGET void NAME(few_rows)(void *arguments, int64_t start, int64_t stop) {
    const struct few_rows *a = arguments;
    const struct few_rows_part *part = a->parts;
    int64_t before = 0;
    for (int64_t block = start; block < stop; block++) {
        while (block - before >= few_rows_blocks(part)) before += few_rows_blocks(part++);
        if (a->type == FEW_FP32) NAME(four)(a, part, FEW_FP32, 4 * (block - before));
        else NAME(four)(a, part, FEW_BF16, 4 * (block - before));
    }
}

#undef TILE
#undef UP_TO_MOST
