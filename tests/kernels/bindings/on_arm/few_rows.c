/* Products of 1 to 13 rows, of widths that fill no register, beside sums in float64. */
#include "drawn.h"

struct few_rows_part {
    const void *w, *bias;
    void *y;
    int64_t outs, narrow;
};
struct few_rows {
    const void *x;
    const struct few_rows_part *parts;
    int64_t count, rows, width, apart;
    int type;
};
int veneer_few_rows(const struct few_rows *call, int most);

static void one(int type, int most, int64_t rows, int64_t width) {
    const int64_t outs = 11;
    void *x = values(rows * width, type), *w = values(outs * width, type),
         *bias = values(outs, type), *y = malloc((size_t)(4 * rows * outs));
    struct few_rows_part part = {w, bias, y, outs, 0};
    struct few_rows call = {x, &part, 1, rows, width, width, type};
    bad += veneer_few_rows(&call, most) != 0;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t o = 0; o < outs; o++) {
            double sum = value(bias, o, type), size = fabs(sum);
            for (int64_t k = 0; k < width; k++) {
                const double both =
                    (double)value(x, m * width + k, type) * value(w, o * width + k, type);
                sum += both, size += fabs(both);
            }
            compare(value(y, m * outs + o, type), sum, size, type);
        }
    free(x), free(w), free(bias), free(y);
}

int main(void) {
    for (int type = 0; type < 2; type++)
        for (int most = 2; most < 5; most += 2)
            for (int64_t rows = 1; rows < 14; rows += 3)
                for (int64_t width = 61; width < 140; width += 37) one(type, most, rows, width);
    return report();
}
