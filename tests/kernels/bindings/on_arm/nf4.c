/* 4-bit weights: decoded with NEON to the bits of plain C, from any element on; and their products
   with a few rows, beside sums in float64 of the decoded weights. */
#include "drawn.h"
#include "nf4.h"

void veneer_nf4_dequantize(const struct nf4_weights *w, int64_t start, int64_t count, void *out,
                           int type, int level);
int veneer_nf4_product(const struct nf4_weights *w, int64_t start, int64_t outs, int64_t width,
                       const void *x, int64_t rows, const void *bias, void *y, int type,
                       int level);

enum { COUNT = 1500 };
static uint8_t packed[COUNT / 2], codes[COUNT];
static float scales[COUNT], table[16], nested_table[256], nested_scales[COUNT];

static void decoded(const struct nf4_weights *w, int64_t start, int64_t count, int type) {
    const size_t bytes = (size_t)count * (type == FP32 ? 4 : 2);
    uint8_t *fast = malloc(bytes + 1), *plain = malloc(bytes);
    fast[bytes] = 77;
    veneer_nf4_dequantize(w, start, count, fast, type, -1);
    veneer_nf4_dequantize(w, start, count, plain, type, 0);
    cases++;
    bad += memcmp(fast, plain, bytes) != 0 || fast[bytes] != 77;
    free(fast), free(plain);
}

static void multiplied(const struct nf4_weights *w, int64_t start, int64_t rows, int64_t width,
                       int type, int level) {
    const int64_t outs = (COUNT - start) / width;
    void *x = values(rows * width, type == FP32 ? FEW_FP32 : FEW_BF16);
    void *bias = rows % 2 ? values(outs, type == FP32 ? FEW_FP32 : FEW_BF16) : NULL;
    float *y = malloc((size_t)(4 * rows * outs)), *plain = malloc(4 * COUNT);
    veneer_nf4_dequantize(w, start, outs * width, plain, type, 0);
    bad += veneer_nf4_product(w, start, outs, width, x, rows, bias, y, type, level) != 0;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t o = 0; o < outs; o++) {
            double sum = bias == NULL ? 0 : load_as(bias, o, type), size = fabs(sum);
            for (int64_t k = 0; k < width; k++) {
                const double both =
                    (double)load_as(x, m * width + k, type) * load_as(plain, o * width + k, type);
                sum += both, size += fabs(both);
            }
            compare(load_as(y, m * outs + o, type), sum, size, type == FP32 ? FEW_FP32 : FEW_BF16);
        }
    free(x), free(bias), free(y), free(plain);
}

int main(void) {
    for (int i = 0; i < COUNT / 2; i++) packed[i] = (uint8_t)rand();
    for (int i = 0; i < COUNT; i++) codes[i] = (uint8_t)rand();
    for (int i = 0; i < COUNT; i++) scales[i] = drawn(), nested_scales[i] = drawn();
    for (int i = 0; i < 16; i++) table[i] = 2 * drawn();
    for (int i = 0; i < 256; i++) nested_table[i] = drawn();
    scales[2] = 0, scales[3] = 1e-40f, scales[4] = INFINITY, scales[5] = 65519, table[7] = 1;
    for (int64_t block = 32; block < 256; block *= 2)
        for (int type = 0; type < 3; type++) {
            const struct nf4_weights own = {packed, scales, table, NULL, NULL, COUNT, block, 1, 0},
                                     nested = {packed,        codes, table, nested_table,
                                               nested_scales, COUNT, block, 4, 0.25f};
            for (int64_t start = 0; start < 70; start += 23)
                for (int64_t count = 1; count < COUNT - start; count += 201) {
                    decoded(&own, start, count, type);
                    decoded(&nested, start, count, type);
                }
            for (int64_t rows = 1; rows < 9; rows++)
                for (int64_t width = 61; width < 200; width += 67)
                    for (int level = -1; level < 5; level++)
                        multiplied(&nested, width / 2, rows, width, type, level);
        }
    return report();
}
