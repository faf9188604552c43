/* What a product of a few rows with updates is given. */
#ifndef VENEER_UPDATES_H
#define VENEER_UPDATES_H

#include <stdint.h>

/* Rows [first, first + rows) of a part's y += scale * (x A^T) B^T; A and B as factors.h says. Those
   of one turn do not meet; a part's are in the order of their turns. */
struct few_rows_update {
    const void *A, *B;
    int64_t first, rows, rank, turn;
    float scale;
};

/* y (all rows, outs) = x W^T + bias where there is a W, else as it stands; then the updates, turn
 * after turn. rows: 0, or the product has rows [first, first + rows) of x and of y alone. */
struct few_rows_updated_part {
    const void *w, *bias;
    void *y;
    const struct few_rows_update *updates;
    int64_t outs, count, narrow, first, rows;
};

/* The parts share x. down: room for each update's rows times its rank. */
struct few_rows_updated {
    const void *x;
    void *down;
    const struct few_rows_updated_part *parts;
    int64_t count, rows, width, apart;
    int type;
};

/* 1: no memory, for x on tiles, for the parts or for the updates. */
int veneer_few_rows_updated(const struct few_rows_updated *call, int most);

#endif
