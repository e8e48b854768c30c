#define _GNU_SOURCE
#include "core/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MAX_THREADS = MQ_POOL_LIMIT };

typedef struct job {
    mq_range_fn fn;
    void *arg;
    int64_t count, grain;
    _Atomic int64_t next;
} job;

/* Workers wait for a new ticket; the caller waits until every worker has left the job. One job at a time: job_mutex. */
static struct {
    pthread_mutex_t job_mutex, mutex;
    pthread_cond_t wake, idle;
    pthread_t threads[MAX_THREADS];
    int started;          /* worker threads alive (the caller is not one of them) */
    int wanted;           /* threads a job may use, 0 = not decided yet */
    int busy;             /* workers still inside the current job */
    int stop;
    uint64_t ticket;
    job *current;
} pool = {
    .job_mutex = PTHREAD_MUTEX_INITIALIZER, .mutex = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER, .idle = PTHREAD_COND_INITIALIZER,
};

static _Thread_local int inside_job;
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

static int default_threads(void)
{
    const char *text = getenv("MODELQ_NUM_THREADS");
    if (text != NULL && *text != '\0') {
        char *end;
        long n = strtol(text, &end, 10);
        if (*end == '\0' && n >= 1) return (int)MQ_MIN(n, (long)MAX_THREADS);
    }
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return MQ_MAX(1, MQ_MIN(CPU_COUNT(&set), MAX_THREADS));
    return 1;
}

/* In the child only this thread exists: forget the workers, and take fresh locks, as the old ones may be held by
 * threads that were not copied. */
static void reset_after_fork(void)
{
    pthread_mutex_init(&pool.job_mutex, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.idle, NULL);
    pool.started = pool.busy = pool.stop = 0;
    pool.ticket = 0;
    pool.current = NULL;
    inside_job = 0;
}

static void pool_init(void)
{
    pthread_atfork(NULL, NULL, reset_after_fork);
    pool.wanted = default_threads();
}

static void run_chunks(job *work, int worker)
{
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&work->next, work->grain, memory_order_relaxed);
        if (begin >= work->count) return;
        work->fn(work->arg, begin, MQ_MIN(begin + work->grain, work->count), worker);
    }
}

static void *worker_main(void *argument)
{
    int worker = (int)(intptr_t)argument;
    uint64_t seen = 0;
    inside_job = 1;
    pthread_mutex_lock(&pool.mutex);
    for (;;) {
        while (!pool.stop && (pool.ticket == seen || pool.current == NULL)) pthread_cond_wait(&pool.wake, &pool.mutex);
        if (pool.stop) break;
        seen = pool.ticket;
        job *work = pool.current;
        pool.busy++;
        pthread_mutex_unlock(&pool.mutex);
        run_chunks(work, worker);
        pthread_mutex_lock(&pool.mutex);
        if (--pool.busy == 0) pthread_cond_signal(&pool.idle);
    }
    pthread_mutex_unlock(&pool.mutex);
    return NULL;
}

/* Starts the missing workers; a failure to start one only means fewer threads. Called with job_mutex held. */
static void start_workers(void)
{
    while (pool.started < pool.wanted - 1) {
        void *index = (void *)(intptr_t)(pool.started + 1);
        if (pthread_create(&pool.threads[pool.started], NULL, worker_main, index) != 0) break;
        pool.started++;
    }
}

static void stop_workers(void)
{
    pthread_mutex_lock(&pool.mutex);
    pool.stop = 1;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
    for (int i = 0; i < pool.started; i++) pthread_join(pool.threads[i], NULL);
    pool.started = pool.stop = 0;
}

int mq_pool_threads(void)
{
    pthread_once(&pool_once, pool_init);
    return inside_job ? 1 : pool.wanted;
}

int mq_pool_max_threads(void)
{
    pthread_once(&pool_once, pool_init);
    return pool.wanted;
}

int mq_pool_set_threads(int n)
{
    pthread_once(&pool_once, pool_init);
    if (inside_job || n < 0) return MQ_ERR_STATE;
    pthread_mutex_lock(&pool.job_mutex);
    stop_workers();
    pool.wanted = n == 0 ? default_threads() : MQ_MIN(n, MAX_THREADS);
    pthread_mutex_unlock(&pool.job_mutex);
    return MQ_OK;
}

static void publish(job *work)
{
    pthread_mutex_lock(&pool.mutex);
    pool.current = work;
    pool.ticket++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
}

static void retire(void)
{
    pthread_mutex_lock(&pool.mutex);
    pool.current = NULL;
    while (pool.busy > 0) pthread_cond_wait(&pool.idle, &pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
}

void mq_parallel_for(int64_t count, int64_t grain, mq_range_fn fn, void *arg)
{
    job work = {.fn = fn, .arg = arg, .count = count, .grain = MQ_MAX(grain, (int64_t)1)};
    if (count <= 0) return;
    if (mq_pool_threads() == 1 || count <= work.grain) {
        for (int64_t begin = 0; begin < count; begin += work.grain)
            fn(arg, begin, MQ_MIN(begin + work.grain, count), 0);
        return;
    }
    pthread_mutex_lock(&pool.job_mutex);
    start_workers();
    inside_job = 1;
    publish(&work);
    run_chunks(&work, 0);
    retire();
    inside_job = 0;
    pthread_mutex_unlock(&pool.job_mutex);
}
