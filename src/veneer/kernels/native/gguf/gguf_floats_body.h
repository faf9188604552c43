/* Included by gguf_floats.c once for each set of instructions, behind gguf_unpack.h: FUSED is a
   multiplication and an addition rounded once, TOTAL the sums of the lanes of four registers. */

/* The 32 values number j of a block of W against those of `rows` rows of x, `width` apart. */
INLINE void NAME(add_32)(int kind, const uint8_t *p, int j, const float *scale, const float *offset,
                         const int rows, const float *x, int64_t width, NAME(fv) (*sums)[4],
                         int r) {
    UNROLLED(2, k, 2) {
        const b16v codes = NAME(codes)(kind, p, j, k);
        const NAME(fv) times = scale[SCALE_AT(kind, j, k)] - (NAME(fv)){},
                       plus = offset[OFFSET_AT(kind, j)] - (NAME(fv)){};
        UNROLLED(2, part, 16 / W) {
            const NAME(fv) value = FUSED(NAME(floats)(codes, part), times, plus);
            UNROLLED(3, m, rows) {
                NAME(fv) of_x;
                memcpy(&of_x, x + m * width + 32 * j + 16 * k + W * part, sizeof of_x);
                sums[m][r] = FUSED(of_x, value, sums[m][r]);
            }
        }
    }
}

/* Four rows of W, from `out` on, against `rows` rows of x. */
INLINE void NAME(tile)(int kind, const int rows, const struct packed_rows *of, int64_t row_bytes,
                       int64_t out) {
    const struct format format = format_of(kind);
    const int64_t left = of->outs - out;
    const float *x = of->x;
    const uint8_t *first = (const uint8_t *)of->packed + out * row_bytes, *soon = first + AHEAD;
    NAME(fv) sums[MOST_FLOAT_ROWS][4] = {};
    for (int64_t at = 0; at < row_bytes;
         at += format.bytes, x += format.size, soon += 4 * format.bytes) {
        for (int line = 0; line < 4 * format.bytes; line += 64)
            __builtin_prefetch(soon + line, 0, 2);
        UNROLLED(4, r, 4) {
            const uint8_t *w = first + (r < left ? r : left - 1) * row_bytes + at;
            OF_BLOCK(kind, w, NAME(add_32), rows, x, of->width, sums, r)
        }
    }
    for (int m = 0; m < rows; m++) {
        f4v totals = TOTAL(sums[m]);
        const int64_t count = left < 4 ? left : 4;
        if (of->bias != NULL) totals += some_floats((const float *)of->bias + out, count, FEW_FP32);
        put_floats((float *)of->y + m * of->outs + out, totals, count, FEW_FP32);
    }
}

/* Blocks [start, stop) of all. */
INLINE void NAME(of_kind)(int kind, const int rows, const struct calls *calls, int64_t start,
                          int64_t stop) {
    int64_t before = 0;
    for (int64_t i = 0; i < calls->count && before < stop; before += blocks_of(calls->of[i++]))
        for (int64_t block = start > before ? start - before : 0;
             block < blocks_of(calls->of[i]) && before + block < stop; block++)
            NAME(tile)(kind, rows, calls->of[i], calls->row_bytes, 4 * block);
}

static TARGET void NAME(rows)(void *arguments, int64_t start, int64_t stop) {
    const struct calls *calls = arguments;
    const int kind = (int)calls->of[0]->kind;
    switch (calls->of[0]->rows) {
    case 1: OF_ANY_KIND(kind, NAME(of_kind), 1, calls, start, stop) break;
    case 2: OF_ANY_KIND(kind, NAME(of_kind), 2, calls, start, stop) break;
    default: OF_ANY_KIND(kind, NAME(of_kind), 3, calls, start, stop)
    }
}

#undef FUSED
#undef TOTAL
