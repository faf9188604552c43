/* Products of many rows in bf16 beside sums in float64: of W as it lies and turned over, with a
   bias and added to y; one row alone gives the bits that it has among others. */
#include "drawn.h"
#include "products.h"

static void one(int64_t rows, int64_t width, int64_t outs, int along, int add, int biased) {
    uint16_t *x = values(rows * width, FEW_BF16), *w = values(outs * width, FEW_BF16),
             *bias = values(outs, FEW_BF16), *before = values(rows * outs, FEW_BF16),
             *y = malloc((size_t)(2 * rows * outs)), *alone = malloc((size_t)(2 * outs));
    memcpy(y, before, (size_t)(2 * rows * outs));
    struct product call = {x, w, biased ? bias : NULL, y, rows, width, outs, along, add};
    if (veneer_product(&call) != !veneer_has_bfdot()) bad++;
    for (int64_t m = 0; veneer_has_bfdot() && m < rows; m++) {
        memcpy(alone, before + m * outs, (size_t)(2 * outs));
        call.x = x + m * width, call.y = alone, call.rows = 1;
        bad += veneer_product(&call) != 0 || memcmp(alone, y + m * outs, (size_t)(2 * outs)) != 0;
        for (int64_t n = 0; n < outs; n++) {
            double sum = biased ? value(bias, n, FEW_BF16) : 0;
            if (add) sum += value(before, m * outs + n, FEW_BF16);
            double size = fabs(sum);
            for (int64_t k = 0; k < width; k++) {
                const double both = (double)value(x, m * width + k, FEW_BF16) *
                                    value(w, along ? k * outs + n : n * width + k, FEW_BF16);
                sum += both, size += fabs(both);
            }
            compare(value(y, m * outs + n, FEW_BF16), sum, size, FEW_BF16);
        }
    }
    free(x), free(w), free(bias), free(before), free(y), free(alone);
}

int main(void) {
    const int64_t sizes[] = {1, 7, 8, 9, 16, 30, 67};
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 7; j++)
            for (int kind = 0; kind < 8; kind++)
                one(sizes[i], 2 * sizes[(i + j + kind) % 7], sizes[j], kind & 1, kind & 2,
                    kind & 4);
    one(9, 5000, 70, 0, 1, 1); /* more columns than are kept at once */
    one(9, 5000, 70, 1, 1, 1);
    return report();
}
