/* Runs kernels on the CPU: see cuda_shim.h. */
#include "cuda_shim.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

enum { MOST_THREADS = 1024, WARP = 32, STACK_BYTES = 256 * 1024, MOST_SHARED = 16, SHARED_BYTES = 48 * 1024 };
enum { FORWARD, REVERSE, RANDOM };

enum { MOST_COPIES = 64, COPY_BYTES = 16 };

/* An asynchronous copy that is under way. */
typedef struct copy {
    void *to;
    const void *from;
    int count, group;
} copy;

typedef enum fiber_state { READY, AT_BARRIER, AT_EXCHANGE, ENDED } fiber_state;

typedef struct fiber {
#if defined(__x86_64__)
    void *place;            /* where it waits: the end of its stack */
#else
    ucontext_t context;
#endif
    char *stack;
    fiber_state state;
    unsigned mask;          /* AT_EXCHANGE: the lanes that take part, */
    int distance;           /* how far each looks, */
    uint64_t bits, answer;  /* what it gives and gets */
    void (*compute)(void *const *lanes);    /* or an operation of the warp, */
    void *own;              /* and what it gives to that */
    copy copies[MOST_COPIES];
    int copy_count, group;  /* group: the one that copies now go to */
    void *fake_stack;       /* of the sanitizer */
} fiber;

static fiber fibers[MOST_THREADS];
static int thread_count, current;
static const mq_shim_call *running;
static int order = FORWARD, fail_after, fail_with;
static uint64_t random_state = 1;
static char reason[200];
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

static struct {
    const void *key;
    void *memory;
    size_t nbytes;
} shared[MOST_SHARED];
static size_t shared_used;

/* Device memory: mq_shim_alloc. */
enum { MOST_ARRAYS = 1024, PAGE_BYTES = 4096 };
static struct {
    char *map;
    size_t nbytes;          /* the page behind them not counted */
    char *memory;
} arrays[MOST_ARRAYS];

static void protect_arrays(int protection)
{
    for (const auto &array : arrays)
        if (array.map != NULL) mprotect(array.map, array.nbytes, protection);
}

/* The pages of these bytes, so far as they are of an array. */
static void protect_range(const void *place, size_t nbytes, int protection)
{
    const char *const first = (const char *)place;
    for (const auto &array : arrays) {
        if (array.map == NULL || first < array.map || first >= array.map + array.nbytes) continue;
        char *const page = array.map + (first - array.map) / PAGE_BYTES * PAGE_BYTES;
        const char *const end = array.map + array.nbytes;
        const size_t wanted = (size_t)(first + nbytes - page), most = (size_t)(end - page);
        mprotect(page, wanted < most ? wanted : most, protection);
    }
}

/* ---- names of errors ---- */

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver", "the driver is older than the library"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no device is there"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", reason},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const char *cudaGetErrorName(cudaError_t error)
{
    for (const auto &row : errors)
        if (row.error == error) return row.name;
    return "cudaErrorUnknown";
}

const char *cudaGetErrorString(cudaError_t error)
{
    for (const auto &row : errors)
        if (row.error == error) return row.text;
    return "unknown error";
}

/* ---- switching, told to the address sanitizer, which otherwise takes another stack for an overflow ---- */

#if defined(__SANITIZE_ADDRESS__)
static const void *scheduler_stack;
static size_t scheduler_stack_bytes;
static void *scheduler_fake_stack;

static void leave(void **fake_stack, const void *stack, size_t nbytes)
{
    __sanitizer_start_switch_fiber(fake_stack, stack, nbytes);
}

static void arrive(void *fake_stack, const void **stack, size_t *nbytes)
{
    __sanitizer_finish_switch_fiber(fake_stack, stack, nbytes);
}

/* Frames that nobody will return from: the same addresses may be a stack again. */
static void forget(const char *stack)
{
    __asan_unpoison_memory_region(stack, STACK_BYTES);
}
#else
static const void *scheduler_stack;
static size_t scheduler_stack_bytes;
static void *scheduler_fake_stack;
static void leave(void **, const void *, size_t) {}
static void arrive(void *, const void **, size_t *) {}
static void forget(const char *) {}
#endif

/* swapcontext saves the signal mask by system calls, and the address sanitizer then clears the shadow of whole stacks,
 * either of which costs more than most threads do; longjmp it takes for leaving all frames. So where the calling
 * convention is known registers are changed here (System V ABI, AMD64 supplement, 3.2.1: those that a callee keeps). */
#if defined(__x86_64__)
extern "C" void mq_shim_switch(void **leave_at, void *arrive_at);
__asm__(".text\n"
        ".hidden mq_shim_switch\n"
        ".type mq_shim_switch, @function\n"
        "mq_shim_switch:\n"
        "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
        "    ret\n"
        ".size mq_shim_switch, .-mq_shim_switch\n");

enum { KEPT_REGISTERS = 6 };
static void *scheduler;

/* As if it had switched away where fiber_main begins. Stacks begin in different cache lines: else all share a few. */
static void prepare(fiber *made, void (*start)())
{
    const int64_t index = made - fibers;
    void **top = (void **)(made->stack + STACK_BYTES - (index % 64 + 1) * 256);
    top[-1] = NULL;             /* where fiber_main would return to */
    top[-2] = (void *)start;
    for (int i = 0; i < KEPT_REGISTERS; i++) top[-3 - i] = NULL;
    made->place = top - 2 - KEPT_REGISTERS;
}

static void switch_to_scheduler(fiber *self)
{
    mq_shim_switch(&self->place, scheduler);
}

static void switch_to_fiber(fiber *next)
{
    mq_shim_switch(&scheduler, next->place);
}
#else
static ucontext_t scheduler;

static void prepare(fiber *made, void (*start)())
{
    getcontext(&made->context);
    made->context.uc_stack.ss_sp = made->stack;
    made->context.uc_stack.ss_size = STACK_BYTES;
    made->context.uc_link = NULL;
    makecontext(&made->context, start, 0);
}

static void switch_to_scheduler(fiber *self)
{
    swapcontext(&self->context, &scheduler);
}

static void switch_to_fiber(fiber *next)
{
    swapcontext(&scheduler, &next->context);
}
#endif

/* Back to the scheduler, until it comes back here. */
static void yield()
{
    fiber *self = &fibers[current];
    leave(&self->fake_stack, scheduler_stack, scheduler_stack_bytes);
    switch_to_scheduler(self);
    arrive(fibers[current].fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

/* A fiber lives on when its thread has ended, and is then the same thread of the next block. */
static void fiber_main()
{
    arrive(NULL, &scheduler_stack, &scheduler_stack_bytes);
    for (;;) {
        running->run(running->call);
        fibers[current].state = ENDED;
        yield();
    }
}

static void resume(int thread)
{
    fiber *next = &fibers[thread];
    current = thread;
    threadIdx = dim3((unsigned)thread % blockDim.x, (unsigned)thread / blockDim.x % blockDim.y,
                     (unsigned)thread / (blockDim.x * blockDim.y));
    leave(&scheduler_fake_stack, next->stack, STACK_BYTES);
    switch_to_fiber(next);
    arrive(scheduler_fake_stack, NULL, NULL);
}

/* ---- what threads wait for ---- */

void __syncthreads()
{
    fibers[current].state = AT_BARRIER;
    yield();
}

/* The last lane to come finds the answers of all. */
static void settle_exchange(int first, unsigned mask)
{
    void (*const compute)(void *const *) = fibers[current].compute;
    void *lanes[WARP];
    const int end = first + WARP < thread_count ? first + WARP : thread_count;
    for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1u)) continue;
        if (first + lane >= end) return;
        const fiber *other = &fibers[first + lane];
        if (other->state != AT_EXCHANGE || other->mask != mask || other->compute != compute) return;
        lanes[lane] = other->own;
    }
    if (compute != NULL) compute(lanes);
    for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1u)) continue;
        fiber *own = &fibers[first + lane];
        const int from = lane ^ own->distance;
        /* a lane that takes no part has nothing to give: rubbish */
        own->answer = from < WARP && (mask >> from & 1u) ? fibers[first + from].bits : 0xa5a5a5a5a5a5a5a5u;
        own->state = READY;
    }
}

uint64_t mq_shim_exchange(unsigned mask, uint64_t bits, int distance)
{
    fiber *self = &fibers[current];
    self->mask = mask;
    self->bits = bits;
    self->distance = distance;
    self->compute = NULL;
    self->state = AT_EXCHANGE;
    settle_exchange(current / WARP * WARP, mask);
    if (self->state == AT_EXCHANGE) yield();
    return self->answer;
}

void mq_shim_warp(void (*compute)(void *const *lanes), void *own)
{
    fiber *self = &fibers[current];
    self->mask = 0xffffffffu;
    self->distance = 0;
    self->compute = compute;
    self->own = own;
    self->state = AT_EXCHANGE;
    settle_exchange(current / WARP * WARP, self->mask);
    if (self->state == AT_EXCHANGE) yield();
}

void mq_shim_copy_async(void *to, const void *from, int count)
{
    fiber *self = &fibers[current];
    if (self->copy_count == MOST_COPIES || (uintptr_t)to % COPY_BYTES != 0 || (uintptr_t)from % COPY_BYTES != 0) {
        fprintf(stderr, "cuda shim: more than %d copies under way, or one that is not aligned\n", (int)MOST_COPIES);
        abort();
    }
    memset(to, 0xa5, COPY_BYTES);
    self->copies[self->copy_count++] = {to, from, count, self->group};
}

void mq_shim_copy_close(void)
{
    fibers[current].group++;
}

void mq_shim_copy_wait(int left)
{
    fiber *self = &fibers[current];
    int kept = 0;
    for (int i = 0; i < self->copy_count; i++) {
        const copy *one = &self->copies[i];
        if (one->group >= self->group - left) {
            self->copies[kept++] = *one;
            continue;
        }
        memset(one->to, 0, COPY_BYTES);
        memcpy(one->to, one->from, (size_t)one->count);
    }
    self->copy_count = kept;
}

void *mq_shim_shared(const void *key, size_t nbytes)
{
    int i = 0;
    for (; i < MOST_SHARED && shared[i].key != NULL; i++)
        if (shared[i].key == key) return shared[i].memory;
    if (i == MOST_SHARED || shared_used + nbytes > SHARED_BYTES) {
        fprintf(stderr, "cuda shim: a block has more than %d arrays or %d bytes of shared memory\n", (int)MOST_SHARED,
                (int)SHARED_BYTES);
        abort();
    }
    shared[i] = {key, malloc(nbytes), nbytes};    /* of its own, so that the sanitizer sees its ends */
    memset(shared[i].memory, 0xa5, nbytes);
    shared_used += nbytes;
    return shared[i].memory;
}

static void free_shared()
{
    for (int i = 0; i < MOST_SHARED && shared[i].key != NULL; i++) {
        free(shared[i].memory);
        shared[i] = {NULL, NULL, 0};
    }
    shared_used = 0;
}

/* ---- the scheduler ---- */

static uint64_t next_random()
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static void arrange(int64_t *places, int64_t count)
{
    for (int64_t i = 0; i < count; i++) places[i] = order == REVERSE ? count - 1 - i : i;
    for (int64_t i = count - 1; order == RANDOM && i > 0; i--) {
        const int64_t j = (int64_t)(next_random() % (uint64_t)(i + 1)), held = places[i];
        places[i] = places[j];
        places[j] = held;
    }
}

static int count_in(fiber_state state)
{
    int count = 0;
    for (int i = 0; i < thread_count; i++) count += fibers[i].state == state;
    return count;
}

/* Everybody waits. Where all wait at a barrier they go on. */
static int open_barrier()
{
    const int waiting = count_in(AT_BARRIER), ended = count_in(ENDED), exchanging = count_in(AT_EXCHANGE);
    if (waiting == thread_count) {
        for (int i = 0; i < thread_count; i++) fibers[i].state = READY;
        return 1;
    }
    snprintf(reason, sizeof reason,
             "block (%u, %u, %u): %d of %d threads wait at a barrier and %d in a warp's exchange, %d have ended",
             blockIdx.x, blockIdx.y, blockIdx.z, waiting, thread_count, exchanging, ended);
    return 0;
}

static cudaError_t run_block()
{
    int64_t places[MOST_THREADS];
    for (int i = 0; i < thread_count; i++) {
        fibers[i].state = READY;
        fibers[i].copy_count = fibers[i].group = 0;
    }
    while (count_in(ENDED) < thread_count) {
        int progress = 0;
        arrange(places, thread_count);
        for (int i = 0; i < thread_count; i++) {
            if (fibers[places[i]].state != READY) continue;
            resume((int)places[i]);
            progress = 1;
        }
        if (!progress && !open_barrier()) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

static void drop_fibers()
{
    for (int i = 0; i < MOST_THREADS && fibers[i].stack != NULL; i++) {
        forget(fibers[i].stack);
        munmap(fibers[i].stack, STACK_BYTES);
        fibers[i].stack = NULL;
    }
}

static cudaError_t make_fiber(fiber *made)
{
    if (made->stack != NULL) return cudaSuccess;
    void *stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) return cudaErrorMemoryAllocation;
    made->stack = (char *)stack;
    prepare(made, fiber_main);
    return cudaSuccess;
}

static cudaError_t make_fibers(int count)
{
    cudaError_t status = cudaSuccess;
    for (int i = 0; i < count && status == cudaSuccess; i++) status = make_fiber(&fibers[i]);
    return status;
}

/* The limits of real devices (CUDA C++ Programming Guide, table of technical specifications). */
bool mq_shim_is_valid(dim3 grid, dim3 block)
{
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    return threads >= 1 && threads <= MOST_THREADS && block.z <= 64 && grid.x >= 1 && grid.x <= 0x7fffffffu &&
           grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
}

static cudaError_t run_grid(dim3 grid)
{
    const int64_t count = (int64_t)grid.x * grid.y * grid.z;
    int64_t *places = (int64_t *)malloc((size_t)count * sizeof *places);
    cudaError_t status = places == NULL ? cudaErrorMemoryAllocation : cudaSuccess;
    if (places != NULL) arrange(places, count);
    for (int64_t i = 0; i < count && status == cudaSuccess; i++) {
        const unsigned place = (unsigned)places[i];
        blockIdx = dim3(place % grid.x, place / grid.x % grid.y, place / (grid.x * grid.y));
        status = run_block();
        free_shared();
    }
    free(places);
    return status;
}

cudaError_t mq_shim_run(const mq_shim_call *call, dim3 grid, dim3 block)
{
    if (!mq_shim_is_valid(grid, block)) return cudaErrorInvalidConfiguration;
    pthread_mutex_lock(&one_at_a_time);
    cudaError_t status = cudaSuccess;
    if (fail_after > 0 && --fail_after == 0) status = (cudaError_t)fail_with;
    thread_count = (int)(block.x * block.y * block.z);
    if (status == cudaSuccess) status = make_fibers(thread_count);
    if (status == cudaSuccess) {
        running = call;
        gridDim = grid;
        blockDim = block;
        protect_arrays(PROT_READ | PROT_WRITE);
        status = run_grid(grid);
        protect_arrays(PROT_NONE);
        if (status != cudaSuccess) drop_fibers();    /* some wait for ever */
    }
    pthread_mutex_unlock(&one_at_a_time);
    return status;
}

/* ---- for tests ---- */

#if defined(__SANITIZE_ADDRESS__)
void *mq_shim_alloc(size_t nbytes)
{
    return malloc(nbytes > 0 ? nbytes : 1);
}

void mq_shim_free(void *memory)
{
    free(memory);
}
#else
/* The end of what is asked for, up to 15 bytes, lies at the end of a page. Called with the lock held. */
static void *find_place(size_t nbytes)
{
    const size_t size = (nbytes + 15) / 16 * 16, pages = (size + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    for (auto &array : arrays) {
        if (array.map != NULL) continue;
        void *map = mmap(NULL, pages + PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) return NULL;
        array = {(char *)map, pages, (char *)map + pages - size};
        return array.memory;
    }
    return NULL;
}

void *mq_shim_alloc(size_t nbytes)
{
    pthread_mutex_lock(&one_at_a_time);
    void *memory = find_place(nbytes);
    pthread_mutex_unlock(&one_at_a_time);
    return memory;
}

void mq_shim_free(void *memory)
{
    pthread_mutex_lock(&one_at_a_time);
    for (auto &array : arrays) {
        if (array.map == NULL || array.memory != memory) continue;
        munmap(array.map, array.nbytes + PAGE_BYTES);
        array = {NULL, 0, NULL};
    }
    pthread_mutex_unlock(&one_at_a_time);
}
#endif

void mq_shim_copy(void *to, const void *from, size_t nbytes)
{
    pthread_mutex_lock(&one_at_a_time);
    protect_range(to, nbytes, PROT_READ | PROT_WRITE);
    protect_range(from, nbytes, PROT_READ | PROT_WRITE);
    memcpy(to, from, nbytes);
    protect_range(to, nbytes, PROT_NONE);
    protect_range(from, nbytes, PROT_NONE);
    pthread_mutex_unlock(&one_at_a_time);
}

void mq_shim_set_order(int wanted, uint64_t seed)
{
    order = wanted;
    random_state = seed * 2 + 1;
}

void mq_shim_fail_launch(int n, int error)
{
    fail_after = n;
    fail_with = error;
}

const char *mq_shim_reason(void)
{
    return reason;
}
