/* Share work over threads that are started once and then wait for more.
 *
 * PyTorch's OpenMP threads are used if available: they spin while they wait, so other threads would compete with them
 * for cores, at up to twice the time of a step. In the child of a fork OpenMP's threads are gone, and calling them
 * would deadlock, so the pool of this file is used. One caller at a time has the pool; concurrent callers, and
 * processes that cannot start threads, work alone. All threads use the caller's floating-point environment, and so
 * treat denormal numbers alike. */
#define _POSIX_C_SOURCE 200809L
#include "step.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

enum { MOST = 256, LINE = 64 };
enum { SPINS = 2000 }; /* polls for work before a thread sleeps, about ten microseconds */

/* A thread's range of items, in separate cache lines. */
typedef struct {
    _Alignas(LINE) atomic_int_fast64_t taken;
    int64_t first, stop;
} range;

typedef struct {
    gwt_work *work;
    void *context;
    range *ranges;
    int threads;
    fenv_t environment;
} share;

/* GOMP_parallel and omp_get_thread_num of PyTorch's OpenMP; NULL for none. */
typedef void gwt_team(void (*work)(void *), void *context, unsigned threads, unsigned flags);
typedef int gwt_number(void);
static _Atomic(gwt_team *) team;
static _Atomic(gwt_number *) number_in_team;
static atomic_int forked;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static struct {
    pthread_mutex_t held; /* held by the caller that uses the pool */
    pthread_mutex_t lock; /* guards the fields below */
    pthread_cond_t begun, left;
    atomic_uint round;
    share *job;  /* NULL if no thread may join */
    int started; /* number of threads */
    int inside;  /* number of threads in the job */
} pool = {.held = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .begun = PTHREAD_COND_INITIALIZER,
          .left = PTHREAD_COND_INITIALIZER};

static inline void pause_a_little(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Work on the thread's own range, then on the rest of the others'. */
static void take_part(share *job, int self)
{
    for (int i = 0; i < job->threads; ++i) {
        range *own = &job->ranges[(self + i) % job->threads];
        const int64_t count = own->stop - own->first;
        for (;;) {
            const int64_t taken = atomic_fetch_add_explicit(&own->taken, 1, memory_order_relaxed);
            if (taken >= count)
                break;
            job->work(job->context, own->first + taken);
        }
    }
}

static void *attend(void *number)
{
    const int self = (int)(intptr_t)number;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&pool.round, memory_order_relaxed) == seen; ++i)
            pause_a_little();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load_explicit(&pool.round, memory_order_relaxed) == seen)
            pthread_cond_wait(&pool.begun, &pool.lock);
        seen = atomic_load_explicit(&pool.round, memory_order_relaxed);
        share *job = pool.job;
        if (job == NULL || self >= job->threads) {
            pthread_mutex_unlock(&pool.lock);
            continue;
        }
        ++pool.inside;
        pthread_mutex_unlock(&pool.lock);
        fesetenv(&job->environment);
        take_part(job, self);
        pthread_mutex_lock(&pool.lock);
        if (--pool.inside == 0)
            pthread_cond_signal(&pool.left);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* Reset the pool in the child of a fork, which has no threads of its parent. */
static void forget(void)
{
    pthread_mutex_init(&pool.held, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.begun, NULL);
    pthread_cond_init(&pool.left, NULL);
    pool.job = NULL;
    pool.started = pool.inside = 0;
    atomic_store(&pool.round, 0);
    atomic_store(&forked, 1);
}

static void forget_after_forks(void)
{
    pthread_atfork(NULL, NULL, forget);
}

/* Start threads up to this number, and return how many there are. Requires the lock. They block all signals. */
static int started(int threads)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (pool.started < threads) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, attend, (void *)(intptr_t)(pool.started + 1)))
            break;
        pthread_detach(thread);
        ++pool.started;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool.started < threads ? pool.started : threads;
}

/* Take part as one of PyTorch's threads; surplus ones return. By its number a thread has the same range in both passes
 * of the limiter: the second reads what is in this core's caches. */
static void join(void *context)
{
    share *job = context;
    const int self = atomic_load(&number_in_team)();
    fenv_t own;
    if (self >= job->threads)
        return;
    fegetenv(&own);
    fesetenv(&job->environment);
    take_part(job, self);
    fesetenv(&own);
}

static void divide(share *job, int64_t count)
{
    for (int i = 0; i < job->threads; ++i) {
        atomic_init(&job->ranges[i].taken, 0);
        job->ranges[i].first = count * i / job->threads;
        job->ranges[i].stop = count * (i + 1) / job->threads;
    }
}

/* Share the job over the pool's threads, or work alone. */
static void share_with_own(share *job, int64_t count)
{
    const int shared = job->threads > 1 && pthread_mutex_trylock(&pool.held) == 0;
    if (!shared) {
        job->threads = 1;
        divide(job, count);
        take_part(job, 0);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    job->threads = 1 + started(job->threads - 1);
    divide(job, count);
    pool.job = job;
    atomic_fetch_add(&pool.round, 1);
    pthread_cond_broadcast(&pool.begun);
    pthread_mutex_unlock(&pool.lock);
    take_part(job, 0);
    pthread_mutex_lock(&pool.lock);
    pool.job = NULL; /* no thread may join any more */
    while (pool.inside)
        pthread_cond_wait(&pool.left, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.held);
}

void share_out(gwt_work *work, void *context, int64_t count, int useful, int threads)
{
    range ranges[MOST];
    share job = {.work = work, .context = context, .ranges = ranges, .threads = useful < threads ? useful : threads};
    if (job.threads > MOST)
        job.threads = MOST;
    if (job.threads > count)
        job.threads = (int)count;
    gwt_team *const lent = atomic_load(&team);
    pthread_once(&once, forget_after_forks);
    fegetenv(&job.environment);
    if (job.threads > 1 && lent != NULL && !atomic_load(&forked)) {
        divide(&job, count);
        lent(join, &job, (unsigned)threads, 0); /* all of them, since it ends threads that are not requested */
    } else
        share_with_own(&job, count);
}

/* Set functions like GOMP_parallel and omp_get_thread_num, whose threads are used; NULL for the pool. */
EXPORT void gwt_lend(gwt_team *parallel, gwt_number *number)
{
    pthread_once(&once, forget_after_forks); /* before first use, so that every child is reset */
    atomic_store(&number_in_team, number);
    atomic_store(&team, parallel);
}

/* Return the number of threads in the pool. */
EXPORT int gwt_threads(void)
{
    pthread_mutex_lock(&pool.lock);
    const int threads = pool.started;
    pthread_mutex_unlock(&pool.lock);
    return threads;
}
