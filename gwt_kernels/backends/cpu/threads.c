/* Threads that are started once, and wait for work that a caller shares with them.
 *
 * They are PyTorch's where those can be had: OpenMP's wait for more work without sleeping, and others beside them would
 * have to share the cores with them, at up to twice the time of a step. A child of a fork has none of them, and what
 * asked for them there would wait forever; so it has threads of this file, which one caller at a time has: another one
 * meanwhile, and a process in which none can be started, works alone. All take over the caller's floating-point
 * environment, so that a number below the smallest normal one is what it is for the caller. */
#define _POSIX_C_SOURCE 200809L
#include "step.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

enum { MOST = 256, LINE = 64 };
enum { SPINS = 2000 }; /* looks for more work before a thread sleeps: some ten microseconds */

/* A range of a thread's own, in cache lines of its own. */
typedef struct {
    _Alignas(LINE) atomic_int_fast64_t taken;
    int64_t first, stop;
} range;

typedef struct {
    gwt_work *work;
    void *context;
    range *ranges;
    int threads;
    atomic_int joined; /* of PyTorch's */
    fenv_t environment;
} share;

/* GOMP_parallel of the OpenMP that PyTorch was linked with; NULL for none. */
typedef void gwt_team(void (*work)(void *), void *context, unsigned threads, unsigned flags);
static _Atomic(gwt_team *) team;
static atomic_int forked;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static struct {
    pthread_mutex_t held; /* by the caller that has the threads */
    pthread_mutex_t lock; /* of all that follows */
    pthread_cond_t begun, left;
    atomic_uint round;
    share *job;  /* NULL where there is nothing, or nothing more, to do */
    int started; /* threads */
    int inside;  /* threads that work on the job */
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

/* Its own range first, then what is left of the others'. */
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

/* What a fork leaves of the threads in the child: nothing. */
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

/* At most as many as are asked for, with the lock held; signals are for the threads of others. */
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

/* One of PyTorch's threads; more may come than have something to do. */
static void join(void *context)
{
    share *job = context;
    const int self = atomic_fetch_add_explicit(&job->joined, 1, memory_order_relaxed);
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

/* By threads of this file, or alone. */
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
    pool.job = NULL; /* who comes now comes too late */
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
        lent(join, &job, (unsigned)threads, 0); /* all of them: it would end those that it is not asked for */
    } else
        share_with_own(&job, count);
}

/* Use the threads behind a function like GOMP_parallel; NULL for those of this file. */
EXPORT void gwt_lend(gwt_team *parallel)
{
    pthread_once(&once, forget_after_forks); /* before it is used, so that a child always knows */
    atomic_store(&team, parallel);
}

/* Threads of this file. */
EXPORT int gwt_threads(void)
{
    pthread_mutex_lock(&pool.lock);
    const int threads = pool.started;
    pthread_mutex_unlock(&pool.lock);
    return threads;
}
