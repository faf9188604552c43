/* Runs a body on the OpenMP threads that torch has already started. Nothing is linked: native.py
   finds the library that torch loaded and hands over four of its functions. Linking another OpenMP
   would start a second pool, whose threads wait by spinning and take the cores from the first.
   Without them everything runs on the calling thread.

   Many calls in a row are made by a team: one parallel region, whose other threads wait for the
   next call of the first. It hands runs out by one counter and waits for those that were taken, so
   a thread that is late keeps nobody waiting. */
#include "parallel.h"
#include <sched.h>
#include <stddef.h>

enum { AWAKE = 256 }; /* turns that a thread waits before it lets others of the machine go first */

static void (*openmp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*openmp_max_threads)(void);
static int (*openmp_thread_num)(void);
static int (*openmp_in_parallel)(void);

void veneer_use_openmp(void *parallel, void *max_threads, void *thread_num, void *in_parallel) {
    openmp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    openmp_max_threads = (int (*)(void))max_threads;
    openmp_thread_num = (int (*)(void))thread_num;
    openmp_in_parallel = (int (*)(void))in_parallel;
}

struct call {
    veneer_body body;
    void *arguments;
    int64_t count, runs;
};

/* left: runs of the call that nobody has taken, < 0: there is no more to come; undone: those that
   are not done. A line of memory each. */
struct team {
    struct call call;
    void (*work)(void *);
    void *arguments;
    int64_t threads;
    __attribute__((aligned(64))) int64_t left;
    __attribute__((aligned(64))) int64_t undone;
};

static _Thread_local struct team *own_team; /* of its first thread, between its runs */

static void make_run(const struct call *call, int64_t run) {
    const int64_t start = call->count * run / call->runs,
                  stop = call->count * (run + 1) / call->runs;
    if (start < stop) call->body(call->arguments, start, stop);
}

static void wait_a_turn(int64_t turns) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    if (turns > AWAKE) sched_yield();
}

/* Whether a run was there: the fields of the call whose run is taken stand until it is done. */
static int take_run(struct team *team) {
    int64_t left = __atomic_load_n(&team->left, __ATOMIC_RELAXED);
    while (left > 0)
        if (__atomic_compare_exchange_n(&team->left, &left, left - 1, 1, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED)) {
            make_run(&team->call, team->call.runs - left);
            __atomic_sub_fetch(&team->undone, 1, __ATOMIC_RELEASE);
            return 1;
        }
    return 0;
}

static void of_a_team(void *data) {
    struct team *team = data;
    if (openmp_thread_num() == 0) {
        own_team = team;
        team->work(team->arguments);
        own_team = NULL;
        __atomic_store_n(&team->left, -1, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t turns = 0; __atomic_load_n(&team->left, __ATOMIC_RELAXED) >= 0; turns++) {
        if (take_run(team)) turns = 0;
        else wait_a_turn(turns);
    }
}

void veneer_wait(const int64_t *undone) {
    for (int64_t turns = 0; __atomic_load_n(undone, __ATOMIC_ACQUIRE) > 0; turns++)
        wait_a_turn(turns);
}

static void made_by(struct team *team, const struct call *call) {
    team->call = *call, own_team = NULL;
    __atomic_store_n(&team->undone, call->runs, __ATOMIC_RELAXED);
    __atomic_store_n(&team->left, call->runs, __ATOMIC_RELEASE);
    while (take_run(team));
    veneer_wait(&team->undone);
    own_team = team;
}

/* A region of its own: threads take the next run as long as there is one. */
static void in_a_region(void *data) { while (take_run(data)); }

int64_t veneer_thread(void) { return openmp_thread_num != NULL ? openmp_thread_num() : 0; }

int64_t veneer_threads(void) {
    if (own_team != NULL) return own_team->threads;
    return openmp_parallel != NULL && !openmp_in_parallel() ? openmp_max_threads() : 1;
}

void veneer_together(void (*work)(void *), void *arguments) {
    struct team team = {.work = work, .arguments = arguments, .threads = veneer_threads()};
    if (team.threads > 1 && own_team == NULL)
        openmp_parallel(of_a_team, &team, (unsigned)team.threads, 0);
    else work(arguments);
}

void veneer_parallel_dealt(veneer_body body, void *arguments, int64_t count, int64_t grain,
                           int64_t turns) {
    int64_t most = veneer_threads(), useful = count / (grain < 1 ? 1 : grain);
    int64_t threads = useful < most ? useful : most;
    if (threads <= 1) {
        if (count > 0) body(arguments, 0, count);
        return;
    }
    const struct call call = {body, arguments, count,
                              useful < threads * turns ? useful : threads * turns};
    if (own_team != NULL) {
        made_by(own_team, &call);
        return;
    }
    struct team team = {.call = call, .left = call.runs, .undone = call.runs};
    openmp_parallel(in_a_region, &team, (unsigned)threads, 0);
}

/* taken: bits of the runs of the second, where these are so few. */
struct both {
    struct call first, second;
    int64_t *undone, threads;
    uint64_t taken;
};

/* The run of the second that a thread takes when `run` is the next: its own ones first. */
static int64_t next_of_second(struct both *both, int64_t run) {
    const int64_t runs = both->second.runs, own = runs * veneer_thread() / both->threads;
    if (runs > 64) return run;
    for (int64_t i = 0;; i++) {
        const uint64_t bit = (uint64_t)1 << (own + i) % runs;
        if (!(__atomic_fetch_or(&both->taken, bit, __ATOMIC_RELAXED) & bit))
            return (own + i) % runs;
    }
}

/* Runs are taken in their order: whoever waits in one of the second, waits for runs that others are
 * at. */
static void of_both(void *data, int64_t start, int64_t stop) {
    struct both *both = data;
    for (int64_t run = start; run < stop; run++) {
        if (run >= both->first.runs) {
            make_run(&both->second, next_of_second(both, run - both->first.runs));
            continue;
        }
        make_run(&both->first, run);
        __atomic_sub_fetch(both->undone, 1, __ATOMIC_RELEASE);
    }
}

void veneer_parallel_behind(veneer_body body, void *arguments, int64_t count, int64_t grain,
                            int64_t turns, struct behind *behind) {
    if (behind == NULL) {
        veneer_parallel_dealt(body, arguments, count, grain, turns);
        return;
    }
    const int64_t threads = veneer_threads(), most = turns * threads,
                  useful = count / (grain < 1 ? 1 : grain), some = useful < most ? useful : most;
    struct both both = {{body, arguments, count, some < 1 ? 1 : some},
                        {behind->body, behind->arguments, behind->count, behind->runs},
                        &behind->undone,
                        threads,
                        0};
    const int64_t all = both.first.runs + both.second.runs;
    behind->undone = both.first.runs;
    veneer_parallel_dealt(of_both, &both, all, 1, all);
}

void veneer_parallel(veneer_body body, void *arguments, int64_t count, int64_t grain) {
    veneer_parallel_dealt(body, arguments, count, grain, 1);
}
