/* Runs a body on the OpenMP threads that torch has already started. Nothing is linked: native.py finds the library that
   torch loaded and hands over four of its functions. Linking another OpenMP would start a second pool, whose threads
   wait by spinning and take the cores from the first. Without them everything runs on the calling thread. */
#include "parallel.h"
#include <stddef.h>

static void (*openmp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*openmp_max_threads)(void);
static int (*openmp_in_parallel)(void);

void veneer_use_openmp(void *parallel, void *max_threads, void *thread_num, void *in_parallel) {
    openmp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    openmp_max_threads = (int (*)(void))max_threads;
    (void)thread_num;
    openmp_in_parallel = (int (*)(void))in_parallel;
}

struct call {
    veneer_body body;
    void *arguments;
    int64_t count, runs, next;
};

/* Takes the next run as long as there is one. */
static void one_thread(void *data) {
    struct call *call = data;
    for (;;) {
        const int64_t run = __atomic_fetch_add(&call->next, 1, __ATOMIC_RELAXED);
        if (run >= call->runs) return;
        const int64_t start = call->count * run / call->runs, stop = call->count * (run + 1) / call->runs;
        if (start < stop) call->body(call->arguments, start, stop);
    }
}

int64_t veneer_threads(void) { return openmp_parallel != NULL && !openmp_in_parallel() ? openmp_max_threads() : 1; }

void veneer_parallel_dealt(veneer_body body, void *arguments, int64_t count, int64_t grain, int64_t turns) {
    int64_t most = veneer_threads(), useful = count / (grain < 1 ? 1 : grain);
    int64_t threads = useful < most ? useful : most;
    if (threads <= 1) {
        if (count > 0) body(arguments, 0, count);
        return;
    }
    const int64_t runs = useful < threads * turns ? useful : threads * turns;
    struct call call = {body, arguments, count, runs, 0};
    openmp_parallel(one_thread, &call, (unsigned)threads, 0);
}

void veneer_parallel(veneer_body body, void *arguments, int64_t count, int64_t grain) {
    veneer_parallel_dealt(body, arguments, count, grain, 1);
}
