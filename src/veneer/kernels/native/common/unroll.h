/* Loops that the compiler unrolls `times` times: for (int i = 0; i < count; i++). */
#ifndef VENEER_UNROLL_H
#define VENEER_UNROLL_H

#define VENEER_PRAGMA(text) _Pragma(#text)
#define UNROLLED(times, i, count) VENEER_PRAGMA(GCC unroll times) for (int i = 0; i < (count); i++)

#endif
