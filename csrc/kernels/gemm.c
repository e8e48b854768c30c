/* The matrix product: cuts C into tasks of rows x columns, K into blocks, and runs the micro-kernel over their tiles
 * (the order of Goto and van de Geijn 2008: a block of A in L2, a panel of B in L1).
 *
 * Every sum runs over K in the same order, in the same blocks, whatever the cut of rows and columns: the bits depend on
 * the kernel and on K only. */
#include "kernels/gemm_kernel.h"

#include <string.h>

#include "core/pool.h"

/* Multiplications below which waking the pool costs more than it brings. Few rows cost what reading B costs, which is
 * as much as so many rows do. */
enum { INLINE_WORK = 1 << 19, READING_ROWS = 8 };

typedef struct gemm_job {
    const mq_gemm_args *args;
    const mq_gemm_kernel *kernel;
    mq_gemm_convert how;
    int64_t depth, k_block, panel_size;   /* units */
    int64_t row_tasks, column_tasks, rows, columns;
    int staged;                           /* A must be copied: converted, or padded with zeros */
} gemm_job;

/* One task's place in C, and its scratch. */
typedef struct task {
    const gemm_job *job;
    int64_t row, column;
    int rows, padded_rows, columns;
    float *sums;                          /* [panel][padded_rows][nr], or one tile if K is one block */
    char *stage;
} task;

/* Block [rows, depth] of A from unit first, as units of which the kernel may read all. */
static const char *block_of_a(const task *task, int64_t first, int64_t depth, int64_t *lda)
{
    const gemm_job *job = task->job;
    const mq_gemm_args *args = job->args;
    const int64_t element = (int64_t)mq_dtype_size(args->a_dtype), per_unit = mq_gemm_unit_elements(job->kernel);
    const char *a = (const char *)args->a + (task->row * args->lda + first * per_unit) * element;
    *lda = args->lda * element;
    if (!job->staged) return a;
    const int64_t present = MQ_MIN(depth * per_unit, args->b->k - first * per_unit);
    for (int i = 0; i < task->rows; i++)
        job->kernel->helpers->convert(job->how, a + i * *lda, present, task->stage + i * depth * 4, depth * per_unit);
    memset(task->stage + task->rows * depth * 4, 0, (size_t)((task->padded_rows - task->rows) * depth * 4));
    *lda = depth * 4;
    return task->stage;
}

/* What the tile at (row, panel) of the task adds up to, to its place in C. */
static void store_tile(const task *task, const float *sums, int row, int column, int rows)
{
    const gemm_job *job = task->job;
    const mq_gemm_args *args = job->args;
    const int64_t at = task->column + column;
    char *c = (char *)args->c;
    mq_gemm_store store = {
        .c = sums, .dtype = args->c_dtype, .ldo = args->ldc,
        .out = c + ((task->row + row) * args->ldc + at) * (int64_t)mq_dtype_size(args->c_dtype),
        .bias = args->bias ? args->bias + at : NULL, .alpha = args->alpha, .accumulate = args->accumulate,
        .rows = MQ_MIN(rows, task->rows - row), .columns = MQ_MIN(job->kernel->nr, task->columns - column),
    };
    job->kernel->helpers->store(&store);
}

/* Whether everything from that row on lies below the diagonal, in columns before `end`. */
static int is_below(const mq_gemm_args *args, int64_t row, int64_t end)
{
    return args->upper && row >= end + args->diagonal;
}

/* The same of a coded B: panel by panel, a piece of which is unpacked into L1 and meets all rows of the task. The sums
 * run over K in the same order, so that the bits are those of numbers. */
static void run_coded_block(const task *task, int64_t first, int64_t depth)
{
    _Alignas(64) uint32_t stage[MQ_CODED_STAGE];
    const gemm_job *job = task->job;
    const mq_gemm_kernel *kernel = job->kernel;
    mq_gemm_tile tile = {.depth = 0};
    const char *a = block_of_a(task, first, depth, &tile.lda);
    for (int column = 0; column < task->columns; column += kernel->nr) {
        float *sums = task->sums + (depth == job->depth ? 0 : column * task->padded_rows);
        for (int64_t done = 0; done < depth; done += tile.depth) {
            tile.depth = MQ_MIN(depth - done, (int64_t)MQ_CODED_UNITS);
            tile.add = first + done > 0;
            tile.b = mq_gemm_unpack_panel(job->args->b, task->column + column, first + done, tile.depth, stage);
            for (int row = 0; row < task->padded_rows; row += kernel->mr) {
                if (is_below(job->args, task->row + row, task->column + column + kernel->nr)) break;
                tile.a = a + row * tile.lda + done * 4;
                tile.c = sums + row * kernel->nr;
                tile.rows = MQ_MIN(kernel->mr, task->padded_rows - row);
                kernel->tile(&tile);
                if (first + done + tile.depth == job->depth) store_tile(task, tile.c, row, column, tile.rows);
            }
        }
    }
}

static void run_block(const task *task, int64_t first, int64_t depth)
{
    const gemm_job *job = task->job;
    const mq_gemm_kernel *kernel = job->kernel;
    const int last = first + depth == job->depth, nr = kernel->nr;
    const char *packed = job->args->b->data;
    mq_gemm_tile tile = {.depth = depth, .add = first > 0};
    const int whole = depth == job->depth;      /* then a tile's sums are done with at once, and may lie in L1 */
    const char *a = block_of_a(task, first, depth, &tile.lda);
    for (int column = 0; column < task->columns; column += nr) {
        float *sums = task->sums + (whole ? 0 : column * task->padded_rows);
        tile.b = packed + ((task->column + column) / nr * job->panel_size + first * nr) * 4;
        for (int row = 0; row < task->padded_rows; row += kernel->mr) {
            if (is_below(job->args, task->row + row, task->column + column + nr)) break;
            tile.a = a + row * tile.lda;
            tile.c = sums + (whole ? 0 : row * nr);
            tile.rows = MQ_MIN(kernel->mr, task->padded_rows - row);
            kernel->tile(&tile);
            if (last) store_tile(task, tile.c, row, column, tile.rows);
        }
    }
}

static void run_tasks(void *argument, int64_t begin, int64_t end, int worker)
{
    const gemm_job *job = argument;
    _Alignas(64) float sums[MQ_GEMM_ROWS * MQ_GEMM_COLUMNS];
    _Alignas(64) char stage[MQ_GEMM_STAGE_BYTES];
    (void)worker;
    if (job->kernel->begin) job->kernel->begin();
    for (int64_t index = begin; index < end; index++) {
        task task = {.job = job, .sums = sums, .stage = stage};
        task.column = index / job->row_tasks * job->columns;
        task.row = index % job->row_tasks * job->rows;
        task.columns = (int)MQ_MIN(job->columns, job->args->b->n - task.column);
        task.rows = (int)MQ_MIN(job->rows, job->args->m - task.row);
        task.padded_rows = MQ_ROUND_UP(task.rows, job->kernel->row_multiple);
        if (is_below(job->args, task.row, task.column + task.columns)) continue;
        for (int64_t first = 0; first < job->depth; first += job->k_block)
            (job->args->b->coding.kind != MQ_NOT_CODED ? run_coded_block : run_block)(
                &task, first, MQ_MIN(job->k_block, job->depth - first));
    }
    if (job->kernel->end) job->kernel->end();
}

/* K = 0: the sum is zero, what is left is bias and C. */
static void run_empty(const gemm_job *job)
{
    static const float zeros[MQ_GEMM_MAX_NR];
    for (int64_t row = 0; row < job->args->m; row++) {
        task task = {.job = job, .row = row, .rows = 1};
        for (int64_t column = 0; column < job->args->b->n; column += job->kernel->nr) {
            task.column = column;
            task.columns = (int)MQ_MIN((int64_t)job->kernel->nr, job->args->b->n - column);
            store_tile(&task, zeros, 0, 0, 1);
        }
    }
}

/* Measured for AMX, which is limited by what L3 delivers and by the traffic of sums between blocks of K: 128 x 256
 * beats both smaller and larger tasks. With several threads there must be enough tasks to share. */
static void cut(gemm_job *job)
{
    const mq_gemm_kernel *kernel = job->kernel;
    const int64_t m = job->args->m, n = job->args->b->n, threads = mq_pool_threads();
    int64_t rows = MQ_GEMM_ROWS, columns = MQ_GEMM_COLUMNS;
    if (job->staged) rows = MQ_MIN(rows, MQ_GEMM_STAGE_BYTES / (job->k_block * 4));
    while (threads > 1 && MQ_CEIL_DIV(m, rows) * MQ_CEIL_DIV(n, columns) < 4 * threads) {
        if (columns > 2 * kernel->nr) columns /= 2;
        else if (rows > 2 * kernel->mr) rows /= 2;
        else break;
    }
    job->rows = rows / kernel->mr * kernel->mr;
    job->columns = columns / kernel->nr * kernel->nr;
    job->row_tasks = MQ_CEIL_DIV(m, job->rows);
    job->column_tasks = MQ_CEIL_DIV(n, job->columns);
}

static int must_stage(const gemm_job *job)
{
    const mq_gemm_args *args = job->args;
    const int copies = job->how == MQ_COPY_BF16 || (job->how == MQ_COPY_F32 && (uintptr_t)args->a % sizeof(float) == 0);
    return !copies || args->b->k != job->depth * mq_gemm_unit_elements(job->kernel) ||
           args->m % job->kernel->row_multiple != 0;
}

void mq_gemm_run(const mq_gemm_args *args)
{
    const mq_gemm_kernel *kernel = args->b->kernel;
    gemm_job job = {.args = args, .kernel = kernel, .how = mq_gemm_conversion(kernel, args->b->kind, args->a_dtype)};
    if (args->m <= 0 || args->b->n <= 0) return;
    if (args->b->k <= 0) {
        run_empty(&job);
        return;
    }
    if (mq_gemm_is_few(args)) {
        mq_gemm_run_few(args);
        return;
    }
    job.depth = mq_gemm_depth(kernel, args->b->k);
    job.panel_size = mq_gemm_panel_size(kernel, args->b->k);
    const int64_t blocks = MQ_CEIL_DIV(job.depth, (int64_t)kernel->k_block);
    job.k_block = MQ_ROUND_UP(MQ_CEIL_DIV(job.depth, blocks), (int64_t)kernel->k_multiple);
    job.staged = must_stage(&job);
    cut(&job);
    const int64_t tasks = job.row_tasks * job.column_tasks;
    const int64_t worth = MQ_MAX(args->m, (int64_t)READING_ROWS) * args->b->n;
    const int small = worth <= INLINE_WORK / MQ_MAX(args->b->k, (int64_t)1);
    mq_parallel_for(tasks, small || mq_pool_threads() == 1 ? tasks : 1, run_tasks, &job);
}
