/* What DoRA adds to a low-rank update, in bf16: see kernels/dense/dora.py. Each tensor of the size of an
   output is passed over once, sums are in float32, in an order that no thread count changes. The
   rank and the widths are multiples of 16; `pairs` are laid out as bf16.h says; magnitude, norm:
   one a column. */
#include "parallel.h"
#include "rank.h"

#if defined(__x86_64__)

struct dora {
    const uint16_t *x, *y, *bias; /* bias: or NULL */
    const uint32_t *pairs;
    const float *magnitude, *norm;
    uint16_t *out, *turned;
    float *partial; /* (blocks, width) */
    int64_t rows, width, rank;
    float scale;
};

/* magnitude / norm; 1 where a row of the weight has no length. */
VENEER_INLINE __m512 factors(const struct dora *a, int64_t c) {
    __m512 norm = _mm512_loadu_ps(a->norm + c);
    __mmask16 real = _mm512_cmp_ps_mask(norm, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_div_ps(_mm512_set1_ps(1.0f), real, _mm512_loadu_ps(a->magnitude + c), norm);
}

VENEER_INLINE __m512 biases(const struct dora *a, int64_t c) {
    return a->bias ? bf16_floats(a->bias + c) : _mm512_setzero_ps();
}

/* 16 V columns from c on of n rows: out = factor * (out - bias + scale * sums) + bias. */
VENEER_INLINE void turn_forward(const struct dora *a, int64_t row, int64_t n, int64_t c,
                                const int V, const float *sums) {
    __m512 more[4], times[4], bias[4];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
        __m512 factor = factors(a, c + 16 * v);
        more[v] = _mm512_sub_ps(factor, _mm512_set1_ps(1.0f));
        times[v] = _mm512_mul_ps(factor, _mm512_set1_ps(a->scale));
        bias[v] = biases(a, c + 16 * v);
    }
    for (int64_t r = 0; r < n; r++) {
        uint16_t *out = a->out + (row + r) * a->width + c;
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            __m512 y = bf16_floats(out + 16 * v);
            y = _mm512_fmadd_ps(more[v], _mm512_sub_ps(y, bias[v]), y);
            bf16_store(out + 16 * v,
                       _mm512_fmadd_ps(times[v], _mm512_loadu_ps(sums + r * COLUMNS + 16 * v), y));
        }
    }
}

/* 16 V columns from c on of n rows: turned = factor * x; partial = sums over the rows of x * (y -
 * bias). */
VENEER_INLINE void turn_backward(const struct dora *a, int64_t row, int64_t n, int64_t c,
                                 const int V, float *partial) {
    __m512 factor[4], bias[4], sum[4];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
        factor[v] = factors(a, c + 16 * v);
        bias[v] = biases(a, c + 16 * v);
        sum[v] = _mm512_setzero_ps();
    }
    for (int64_t r = 0; r < n; r++) {
        int64_t place = (row + r) * a->width + c;
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            __m512 x = bf16_floats(a->x + place + 16 * v);
            sum[v] = _mm512_fmadd_ps(x, _mm512_sub_ps(bf16_floats(a->y + place + 16 * v), bias[v]),
                                     sum[v]);
            bf16_store(a->turned + place + 16 * v, _mm512_mul_ps(x, factor[v]));
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_storeu_ps(partial + c + 16 * v, sum[v]);
}

/* out (rows, width) holds the product with the bias in it. Where the factor is 1 and the update 0,
   no bit changes. Items are blocks of rows; pairs (R / 2, width). */
static VENEER_BF16 void forward_body(void *arguments, int64_t from, int64_t to) {
    const struct dora *a = arguments;
    float sums[BLOCK * COLUMNS];
    for (int64_t block = from; block < to; block++) {
        int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t c = 0; c < a->width; c += COLUMNS) {
            int64_t wide = a->width - c < COLUMNS ? a->width - c : COLUMNS;
            bf16_product((const uint32_t *)(a->x + row * a->rank), a->rank / 2, 1, a->pairs + c,
                         a->width, sums, COLUMNS, n, wide, a->rank / 2, 0);
            if (wide == COLUMNS)
                turn_forward(a, row, n, c, 4, sums);
            else
                for (int64_t i = 0; i < wide; i += 16) turn_forward(a, row, n, c + i, 1, sums + i);
        }
    }
}

/* out (rows, R) = scale * turned W. Items are blocks of rows; pairs (width / 2, R). */
static VENEER_BF16 void backward_body(void *arguments, int64_t from, int64_t to) {
    static const struct mask whole; /* nothing is dropped */
    const struct dora *a = arguments;
    for (int64_t block = from; block < to; block++) {
        int64_t row = block * BLOCK, n = rank_rows(block, a->rows), c = 0;
        float *partial = a->partial + block * a->width;
        for (; c + COLUMNS <= a->width; c += COLUMNS) turn_backward(a, row, n, c, 4, partial);
        for (; c < a->width; c += 16) turn_backward(a, row, n, c, 1, partial);
        rank_down(&whole, a->turned + row * a->width, row, a->pairs, a->out + row * a->rank,
                  a->rank, n, a->width, a->rank, a->scale);
    }
}

struct magnitudes {
    const float *partial, *magnitude, *norm;
    float *grad;
    int64_t blocks, width;
};

/* grad = sum over blocks / magnitude; 0 where norm or magnitude is. Returns how many rows magnitude
 * 0 wiped out of y. */
VENEER_BF16 int64_t veneer_dora_magnitudes(struct magnitudes *a) {
    const __m512 zero = _mm512_setzero_ps();
    int64_t lost = 0;
    for (int64_t c = 0; c < a->width; c += 16) {
        __m512 sum = zero, magnitude = _mm512_loadu_ps(a->magnitude + c);
        for (int64_t b = 0; b < a->blocks; b++)
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(a->partial + b * a->width + c));
        __mmask16 real = _mm512_cmp_ps_mask(_mm512_loadu_ps(a->norm + c), zero, _CMP_GT_OQ);
        __mmask16 there = _mm512_cmp_ps_mask(magnitude, zero, _CMP_NEQ_UQ);
        _mm512_storeu_ps(a->grad + c, _mm512_maskz_div_ps(real & there, sum, magnitude));
        lost += __builtin_popcount(real & ~there & 0xFFFF);
    }
    return lost;
}

struct norms {
    const uint16_t *cross, *B;   /* W A^T and B, both (width, R) */
    const float *gram, *squares; /* A A^T (R, R); ||W||^2 by rows */
    float *norm;
    int64_t width, rank;
    float scale;
};

/* norm = sqrt(squares + 2 scale cross . B + scale^2 B gram . B) by rows, nothing below 0. */
static VENEER_BF16 void norms_body(void *arguments, int64_t from, int64_t to) {
    const struct norms *a = arguments;
    const __m512 scale = _mm512_set1_ps(a->scale), two = _mm512_set1_ps(2.0f);
    for (int64_t o = from; o < to; o++) {
        const uint16_t *B = a->B + o * a->rank, *cross = a->cross + o * a->rank;
        __m512 dot = _mm512_setzero_ps();
        for (int64_t i = 0; i < a->rank; i += 16) {
            __m512 turned = _mm512_setzero_ps();
            for (int64_t j = 0; j < a->rank; j++) {
                union {
                    uint32_t word;
                    float value;
                } b = {(uint32_t)B[j] << 16};
                turned = _mm512_fmadd_ps(_mm512_set1_ps(b.value),
                                         _mm512_loadu_ps(a->gram + j * a->rank + i), turned);
            }
            turned = _mm512_fmadd_ps(turned, scale, _mm512_mul_ps(two, bf16_floats(cross + i)));
            dot = _mm512_fmadd_ps(turned, bf16_floats(B + i), dot);
        }
        float square = a->squares[o] + a->scale * _mm512_reduce_add_ps(dot);
        a->norm[o] = square > 0 ? _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(square))) : 0.0f;
    }
}

void veneer_dora_forward(struct dora *a) {
    veneer_parallel(forward_body, a, rank_blocks(a->rows), 1);
}
void veneer_dora_backward(struct dora *a) {
    veneer_parallel(backward_body, a, rank_blocks(a->rows), 1);
}
void veneer_dora_norms(struct norms *a) { veneer_parallel(norms_body, a, a->width, 64); }

#endif
