/* Threads for the kernels: those that torch runs, so that two pools never fight for the same cores.
 */
#ifndef VENEER_PARALLEL_H
#define VENEER_PARALLEL_H

#include <stdint.h>

#include "unroll.h"

/* Works on items [start, stop) of a call. */
typedef void (*veneer_body)(void *arguments, int64_t start, int64_t stop);

/* Threads that a call may use; which of them one is. */
int64_t veneer_threads(void);
int64_t veneer_thread(void);

/* Splits [0, count) into contiguous runs, at most one a thread and none below `grain` items;
   returns when all are done. Which thread takes which run never changes a result: items are
   independent. */
void veneer_parallel(veneer_body body, void *arguments, int64_t count, int64_t grain);

/* The same in up to `turns` runs a thread, taken as threads come free: where one may be slower than
 * the others. */
void veneer_parallel_dealt(veneer_body body, void *arguments, int64_t count, int64_t grain,
                           int64_t turns);

/* Lines of memory that lie one behind the other. */
struct stretch {
    const char *at;
    int64_t lines;
};

/* What threads go on with that find none left of the items before it, in `runs` runs: of N threads
   the first takes the first N-th of them before others. Where a run needs those items done, it
   waits by veneer_wait(&undone): the runs of them that are not done yet. reads, lines: what memory
   is read, in the order of the runs, for bodies that ask for it early. */
struct behind {
    veneer_body body;
    void *arguments;
    int64_t count, runs, undone;
    const struct stretch *reads;
    int64_t lines;
};

/* As veneer_parallel_dealt; then what is behind, where that is not NULL. */
void veneer_parallel_behind(veneer_body body, void *arguments, int64_t count, int64_t grain,
                            int64_t turns, struct behind *behind);
void veneer_wait(const int64_t *undone);

/* Does some work whose calls of those above are made by one team, which starts and ends once. */
void veneer_together(void (*work)(void *), void *arguments);

#endif
