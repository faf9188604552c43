/* Threads for the kernels: those that torch runs, so that two pools never fight for the same cores. */
#ifndef VENEER_PARALLEL_H
#define VENEER_PARALLEL_H

#include <stdint.h>

/* Works on items [start, stop) of a call. */
typedef void (*veneer_body)(void *arguments, int64_t start, int64_t stop);

/* Threads that a call may use. */
int64_t veneer_threads(void);

/* Splits [0, count) into contiguous runs, at most one a thread and none below `grain` items; returns when all are done.
   Which thread takes which run never changes a result: items are independent. */
void veneer_parallel(veneer_body body, void *arguments, int64_t count, int64_t grain);

/* The same in up to `turns` runs a thread, taken as threads come free: where one may be slower than the others. */
void veneer_parallel_dealt(veneer_body body, void *arguments, int64_t count, int64_t grain, int64_t turns);

/* Does some work whose calls of the two above are made by one team, which starts and ends once. */
void veneer_together(void (*work)(void *), void *arguments);

#endif
