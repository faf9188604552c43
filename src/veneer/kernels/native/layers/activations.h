/* Numbers of activations, as in kernels/bindings/row_calls.py: GELU by its formula with tanh, and
   by its definition. */
#ifndef VENEER_ACTIVATIONS_H
#define VENEER_ACTIVATIONS_H

enum { SILU, GELU_TANH, GELU_ERF, RELU, RELU_SQUARED, SIGMOID };

#endif
