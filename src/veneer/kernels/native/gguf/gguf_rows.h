/* Included by gguf.c once for each set of instructions, behind gguf_unpack.h: blocks to values of
 * any type. */

INLINE void NAME(store)(NAME(fv) value, int type, void *out, int64_t at) {
    NAME(uv) w = (NAME(uv))value;
    NAME(hv) packed;
    if (type == FLOAT32) {
        memcpy((float *)out + at, &value, 4 * W);
        return;
    }
    if (type == BFLOAT16) {
        packed = __builtin_convertvector((w + 0x7FFF + ((w >> 16) & 1)) >> 16, NAME(hv));
    } else { /* fp16, to nearest even, subnormals and infinity included:
                https://github.com/Maratyszcza/FP16 */
        NAME(fv) base = (NAME(fv))(w & 0x7FFFFFFF) * 0x1.0p+112f * 0x1.0p-110f;
        NAME(uv) twice = w + w, sign = w & 0x80000000u, bias = twice & 0xFF000000u;
        bias += (NAME(uv))(bias < 0x71000000u) & (0x71000000u - bias);
        NAME(uv) bits = (NAME(uv))((NAME(fv))((bias >> 1) + 0x07800000u) + base);
        NAME(uv)
        result = ((bits >> 13) & 0x7C00) + (bits & 0x0FFF),
        is_nan = (NAME(uv))(twice > 0xFF000000u);
        packed = __builtin_convertvector((sign >> 16) | (is_nan & 0x7E00) | (~is_nan & result),
                                         NAME(hv));
    }
    memcpy((uint16_t *)out + at, &packed, 2 * W);
}

INLINE void NAME(dequantise_32)(int kind, const uint8_t *p, int j, const float *scale,
                                const float *offset, int type, void *out, int64_t at) {
    for (int k = 0; k < 2; k++) {
        const b16v codes = NAME(codes)(kind, p, j, k);
        for (int part = 0; part < 16 / W; part++) {
            const NAME(fv) value = NAME(floats)(codes, part) * scale[SCALE_AT(kind, j, k)] +
                                   offset[OFFSET_AT(kind, j)];
            NAME(store)(value, type, out, at + 32 * j + 16 * k + W * part);
        }
    }
}

INLINE void NAME(dequantise_kind)(int kind, int type, const struct rows *call, int64_t start,
                                  int64_t stop) {
    const struct format format = format_of(kind);
    const int64_t per_row = call->columns / format.size;
    const uint8_t *p = call->blocks + start * per_row * format.bytes;
    int64_t at = start * call->columns;
    for (int64_t block = 0; block < (stop - start) * per_row;
         block++, p += format.bytes, at += format.size)
        OF_BLOCK(kind, p, NAME(dequantise_32), type, call->out, at)
}

static TARGET void NAME(dequantise)(void *arguments, int64_t start, int64_t stop) {
    const struct rows *call = arguments;
    switch (call->type) {
    case FLOAT32: OF_ANY_KIND(call->kind, NAME(dequantise_kind), FLOAT32, call, start, stop) break;
    case BFLOAT16:
        OF_ANY_KIND(call->kind, NAME(dequantise_kind), BFLOAT16, call, start, stop) break;
    case FLOAT16: OF_ANY_KIND(call->kind, NAME(dequantise_kind), FLOAT16, call, start, stop) break;
    }
}
