/* Included by few_rows.c once for each set of instructions: NAME(x) gives the functions their
   names, TARGET their compiler option. A register holds LANES sums, and VALUES values of x or of W;
   at most MOST rows of x go together. LOAD and LOAD_SOME read a register, the second the first few
   values and zeros behind them; MULTIPLY adds products to sums, TOTAL adds up the lanes of four of
   them; STORE_ROWS, where there is one, does so for four rows of x and stores them. PAIRS: pairs of
   bf16 are multiplied, so x and W have one type. */

/* Four rows of W, from `block` on, against `rows` rows of x from `first` on. fetch: so many lines
   of what will be read soon are asked for in each step. Where nothing but reading takes time a
   processor forgets some, so all are asked for twice. asks: whether `each` lines a step are asked
   for too, from `later` on, of what is read behind the product. */
INLINE TARGET void NAME(tile)(const struct piece *part, const int type, const int rows,
                              const int fetch, const int asks, const char *block, const char *soon,
                              int64_t first, int64_t out, const char *later, int64_t each) {
    const int values = type_of_values(type), weights = type_of_weight(type);
    const int size = few_bytes(weights), of_x_size = few_bytes(values);
    const int twice = fetch == 4 && VALUES * size == LINE;
    const int64_t left = part->outs - out, step = part->width * size;
    const int64_t apart = part->apart * of_x_size;
    const char *x = (const char *)part->x + first * apart, *w[4];
    for (int r = 0; r < 4; r++)
        w[r] = block + (r < left ? r : left - 1) * step; /* none behind the last */
    NAME(sum) sums[MOST][4] = {};
    int64_t k = 0;
    for (; k + VALUES <= part->width; k += VALUES) {
        NAME(value) of_w[4];
        for (int64_t i = 0; asks && i < each; i++, later += LINE)
            __builtin_prefetch(later, 0, SECOND);
        UNROLLED(4, r, 4) {
            of_w[r] = LOAD(w[r] + k * size, weights);
            if (r < fetch) __builtin_prefetch(soon + (k / VALUES * fetch + r) * LINE, 0, SECOND);
            if (r < fetch && twice)
                __builtin_prefetch(soon + (k / VALUES * fetch + r) * LINE + AHEAD, 0, SECOND);
        }
        UNROLLED(6, m, rows) {
            NAME(value) of_x = LOAD(x + m * apart + k * of_x_size, values);
            UNROLLED(4, r, 4) sums[m][r] = MULTIPLY(sums[m][r], of_x, of_w[r]);
        }
    }
    if (k < part->width) {
        const int64_t some = part->width - k;
        NAME(value) of_w[4];
        UNROLLED(4, r, 4) {
            of_w[r] = LOAD_SOME(w[r] + k * size, some, weights);
            if (r < fetch) __builtin_prefetch(soon + (k / VALUES * fetch + r) * LINE, 0, SECOND);
        }
        UNROLLED(6, m, rows) {
            NAME(value) of_x = LOAD_SOME(x + m * apart + k * of_x_size, some, values);
            UNROLLED(4, r, 4) sums[m][r] = MULTIPLY(sums[m][r], of_x, of_w[r]);
        }
    }
#ifdef STORE_ROWS
    if (rows >= 4 && left >= 4) {
        STORE_ROWS(part, values, first, out, sums);
#pragma GCC unroll 6
        for (int m = 4; m < rows; m++)
            store_totals(part, values, first + m, out, 4,
                         TOTAL(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
        return;
    }
#endif
    UNROLLED(6, m, rows)
        store_totals(part, values, first + m, out, left < 4 ? left : 4,
                     TOTAL(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
}

#define TILE(ROWS, FETCH, ASKS)                                                                    \
    NAME(tile)(part, type, ROWS, FETCH, ASKS, block, soon, first, out, lines, each)
#define TILES(rows, fetch, asks) CASE(rows, TILE(rows, fetch, asks))
#if MOST == 6
#define UP_TO_MOST(rows, fetch, asks)                                                              \
    switch (rows) {                                                                                \
        TILES(1, fetch, asks)                                                                      \
        TILES(2, fetch, asks)                                                                      \
        TILES(3, fetch, asks)                                                                      \
        TILES(4, fetch, asks) TILES(5, fetch, asks) default : TILE(6, fetch, asks);                \
    }
#elif MOST == 3
#define UP_TO_MOST(rows, fetch, asks)                                                              \
    switch (rows) { TILES(1, fetch, asks) TILES(2, fetch, asks) default : TILE(3, fetch, asks); }
#else
#define UP_TO_MOST(rows, fetch, asks)                                                              \
    switch (rows) { TILES(1, fetch, asks) default : TILE(2, fetch, asks); }
#endif

/* `count` blocks of W against rows [from, to) of x, near enough equally many at a time: those stay
   in the nearest cache while all of these blocks are multiplied with them. fetch: whether what is
   as long as they are, and lies that and AHEAD behind them, is asked for meanwhile, in the first
   turn or the first two. */
INLINE TARGET void NAME(group)(const struct pieces *all, const struct piece *part, const int type,
                               const char *rows, int64_t number, int64_t count, int64_t from,
                               int64_t to, int fetch, struct later *later) {
    const int64_t turns = (to - from + MOST - 1) / MOST,
                  bytes = 4 * part->width * few_bytes(type_of_weight(type));
    const int64_t turns_of_fetch = !fetch ? 0 : turns > 1 ? 2 : 1, idle = turns - turns_of_fetch;
    for (int64_t turn = 0, first = from; turn < turns; turn++) {
        const int64_t next = from + (to - from) * (turn + 1) / turns;
        for (int64_t i = 0; i < count; i++) {
            const int64_t out = 4 * (number + i), place = (number + count) * bytes + AHEAD;
            const char *block = rows + i * bytes, *soon = NULL, *lines = NULL;
            int64_t each = 0;
            if (later != NULL)
                lines = next_of(later, part->width / VALUES, turn < turns_of_fetch ? 0 : idle,
                                turn + 1 == turns, &each);
            if (turn < turns_of_fetch)
                soon = soon_read(all, part, place + (turn * count + i) * bytes / turns_of_fetch);
            if (later != NULL && soon == NULL) UP_TO_MOST(next - first, 0, 1)
            else if (later != NULL) UP_TO_MOST(next - first, 2, 1)
            else if (soon == NULL) UP_TO_MOST(next - first, 0, 0)
            else if (turns > 1) UP_TO_MOST(next - first, 2, 0)
            else UP_TO_MOST(next - first, 4, 0)
        }
        first = next;
    }
}

/* `group` where there is something to ask for in an idle turn; apart, since a compiler has too much
 * of both. */
static TARGET __attribute__((noinline)) void
NAME(asking_group)(const struct pieces *all, const struct piece *part, const char *rows,
                   int64_t number, int64_t count, int64_t from, int64_t to, int fetch,
                   struct later *later) {
    if (type_of(all, part) == FEW_FP32)
        NAME(group)(all, part, FEW_FP32, rows, number, count, from, to, fetch, later);
    else if (type_of(all, part) == FEW_BF16)
        NAME(group)(all, part, FEW_BF16, rows, number, count, from, to, fetch, later);
#ifndef PAIRS
    else NAME(group)(all, part, FEW_WIDENED, rows, number, count, from, to, fetch, later);
#endif
}

/* The blocks whose costs begin within [start, stop), all of them in a row. */
static TARGET void NAME(few_rows)(void *arguments, int64_t start, int64_t stop) {
    struct pieces *all = arguments;
    void *room = NULL;
    if (all->room > 0 && posix_memalign(&room, 64, (size_t)all->room)) {
        all->failed = 1;
        return;
    }
    int64_t before = 0, begin, end;
    struct later later = later_of(all, start, stop);
    for (const struct piece *part = all->of; part < all->of + all->count && before < stop; part++) {
        const int64_t bytes = row_bytes(all, part), together = group_of(all, part),
                      most = rows_of(all, part);
        blocks_within(part, before, start, stop, &begin, &end);
        const int read = part->decode == NULL && begin < end;
        if (read && before <= start)
            fetch_first(part, 4 * begin * bytes, 4 * together * bytes + AHEAD);
        for (int64_t from = 0; from < part->rows && begin < end; from += most) {
            const int fetch = read && from == 0;
            const int64_t to = part->rows - from < most ? part->rows : from + most;
            for (int64_t block = begin, count; block < end; block += count) {
                count = end - block < together ? end - block : together;
                const char *rows = (const char *)part->w + 4 * block * bytes;
                if (part->decode != NULL) {
                    const int64_t left = part->outs - 4 * block;
                    part->decode(part->w, 4 * block, left < 4 * count ? left : 4 * count, room);
                    rows = room;
                }
                if (later.lines > 0 && to - from > 2 * MOST)
                    NAME(asking_group)(all, part, rows, block, count, from, to, fetch, &later);
                else if (type_of(all, part) == FEW_FP32)
                    NAME(group)(all, part, FEW_FP32, rows, block, count, from, to, fetch, NULL);
                else if (type_of(all, part) == FEW_BF16)
                    NAME(group)(all, part, FEW_BF16, rows, block, count, from, to, fetch, NULL);
#ifndef PAIRS
                else NAME(group)(all, part, FEW_WIDENED, rows, block, count, from, to, fetch, NULL);
#endif
            }
        }
        before += blocks_of(part) * cost_of(part);
    }
    free(room);
}

#undef TILE
#undef TILES
#undef UP_TO_MOST
#undef NAME
#undef TARGET
#undef VALUES
#undef PAIRS
#undef MOST
#undef LOAD
#undef LOAD_SOME
#undef MULTIPLY
#undef TOTAL
#undef STORE_ROWS
