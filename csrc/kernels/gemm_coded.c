/* A quantized operand B that stays codes: its layout in memory (gemm_kernel.h), products of few rows, and the pieces
 * of it that products of many rows are about to multiply. */
#include "kernels/gemm_kernel.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/pool.h"
#include "format/pack.h"

enum { SIXTEEN = 16, ROW_CHUNK_BYTES = 128 * 1024, SLACK = 64, WHOLE_ROW = 62, SCALES = 256,
       FLUSH = 0x8040 };      /* MXCSR's flush-to-zero and denormals-are-zero */

static int64_t padded_rows(const mq_gemm_kernel *kernel, int64_t n)
{
    return MQ_ROUND_UP(n, (int64_t)kernel->nr);
}

/* mq_coding.block_shift, or -1: of no power of two. */
static int block_shift(const mq_coded_matrix *matrix)
{
    for (int shift = 0; shift < 32; shift++)
        if ((int64_t)SIXTEEN << shift == matrix->block_cols) return shift;
    return matrix->block_cols >= matrix->k ? WHOLE_ROW : -1;
}

/* Codes of 6 bits take a byte each, so that all floats of more than 4 bits are decoded alike. */
static mq_code_kind kind_of(const mq_scheme_row *scheme)
{
    const mq_codec element = mq_format_get(scheme->element)->codec;
    if (element.bits == 4) return scheme->scale == MQ_FMT_FP32 ? MQ_CODED_BY_VALUES : MQ_CODED_BY_TABLE;
    return element.kind == MQ_KIND_INT ? MQ_CODED_INTS : MQ_CODED_FLOATS;
}

/* Powers of two of sixteens that there is code for; 2 is 2 and more. */
int mq_gemm_can_code(const mq_coded_matrix *matrix)
{
    const int shift = block_shift(matrix);
    switch (kind_of(matrix->scheme)) {
    case MQ_CODED_BY_TABLE: return shift == 0 || shift == 1;
    case MQ_CODED_FLOATS:
        if (mq_format_get(matrix->scheme->element)->codec.mantissa_bits != 3) return shift == 1;
        return shift >= 1;
    default: return shift >= 1;
    }
}

static int is_nibbles(const mq_coding *coding)
{
    return coding->kind == MQ_CODED_BY_TABLE || coding->kind == MQ_CODED_BY_VALUES;
}

static int64_t chunk_bytes(const mq_coding *coding)
{
    return is_nibbles(coding) ? MQ_CHUNK / 2 : MQ_CHUNK;
}

/* Where the codes of a row begin; chunks follow at MQ_ROWS_BESIDE times their size. */
static int64_t row_at(const mq_coding *coding, int64_t row)
{
    const int64_t beside = row % MQ_ROWS_BESIDE;
    return (int64_t)coding->codes + (row - beside) * coding->row_codes + beside * chunk_bytes(coding);
}

static size_t scale_bytes(const mq_coding *coding)
{
    return coding->byte_scales ? 1 : sizeof(float);
}

static size_t table_bytes(const mq_coding *coding, const mq_gemm_kernel *kernel)
{
    if (!coding->byte_scales) return 0;
    if (coding->kind != MQ_CODED_BY_TABLE) return SCALES * sizeof(float);
    return (size_t)SCALES * SIXTEEN * (kernel->unit == MQ_UNIT_PAIR ? sizeof(uint16_t) : sizeof(float));
}

static mq_coding coding_of(const mq_gemm_kernel *kernel, const mq_coded_matrix *matrix)
{
    const mq_codec element = mq_format_get(matrix->scheme->element)->codec;
    const int64_t chunks = MQ_CEIL_DIV(matrix->k, (int64_t)MQ_CHUNK), rows = padded_rows(kernel, matrix->n);
    mq_coding coding = {
        .kind = kind_of(matrix->scheme), .mantissa_bits = element.mantissa_bits, .half = matrix->dtype == MQ_F16,
        .byte_scales = matrix->scheme->scale != MQ_FMT_FP32,
    };
    for (uint32_t code = 0; is_nibbles(&coding) && code < 16; code++) coding.values[code] = mq_decode(code, element);
    coding.block_shift = block_shift(matrix);
    coding.row_codes = chunks * chunk_bytes(&coding);
    coding.row_scales = ((chunks * (MQ_CHUNK / SIXTEEN) - 1) >> coding.block_shift) + 1;
    coding.codes = SLACK;
    coding.scales = MQ_ROUND_UP(coding.codes + (size_t)(rows * coding.row_codes), (size_t)SLACK);
    coding.table = coding.scales + (size_t)(rows * coding.row_scales) * scale_bytes(&coding);
    coding.table = MQ_ROUND_UP(coding.table, (size_t)SLACK);
    coding.nbytes = coding.table + table_bytes(&coding, kernel) + SLACK;
    return coding;
}

size_t mq_gemm_coded_size(mq_gemm_kind kind, const mq_coded_matrix *matrix)
{
    return coding_of(mq_gemm_kernel_of(kind), matrix).nbytes;
}

/* Bytes are decoded by way of subnormal float32, which the caller's thread may have told the processor to take for
 * zero: a product's own steps are for others to say. Returns what leave_subnormals takes. */
static unsigned keep_subnormals(void)
{
#if defined(__x86_64__)
    const unsigned state = _mm_getcsr();
    if (state & FLUSH) _mm_setcsr(state & ~(unsigned)FLUSH);
    return state;
#else
    return 0;
#endif
}

static void leave_subnormals(unsigned state)
{
#if defined(__x86_64__)
    if (state & FLUSH) _mm_setcsr(state);
#else
    (void)state;
#endif
}

/* ---- packing ---- */

typedef struct code_job {
    const mq_coded_matrix *matrix;
    const mq_packed *out;
    int bits;                   /* of a code as the matrix has it */
    float factor;               /* of scales: what decoding leaves out, a power of two */
    _Atomic int bad;
} code_job;

/* Columns [first, first + count) of a row, a byte per code; first is a multiple of 8. */
static void read_codes(const code_job *job, int64_t row, int64_t first, int64_t count, uint8_t *codes)
{
    const mq_coded_matrix *matrix = job->matrix;
    switch (matrix->scheme->packing) {
    case MQ_PACK_NONE: memcpy(codes, matrix->codes + row * matrix->k + first, (size_t)count); break;
    case MQ_PACK_ROW:
        mq_unpack_bits(matrix->codes + row * mq_packed_bytes(matrix->k, job->bits) + first * job->bits / 8, count,
                       job->bits, codes);
        break;
    case MQ_PACK_ROW_PAIRS:
        for (int64_t i = 0; i < count; i++)
            codes[i] = (uint8_t)(matrix->codes[row / 2 * matrix->k + first + i] >> (row % 2 * 4)) & 15;
        break;
    }
    if (job->bits == 6)
        for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)((codes[i] & 31) | (codes[i] & 32) << 2);
}

/* Whether a code is none of a finite number: decoding would take its bits for one. */
static int is_special(const uint8_t *codes, int64_t count, mq_codec codec)
{
    const uint32_t largest = mq_codec_max_code(codec);
    int special = 0;
    for (int64_t i = 0; i < count; i++) special |= (codes[i] & 0x7fu) > largest;
    return special;
}

static void write_chunk(const mq_coding *coding, const uint8_t *codes, uint8_t *chunk)
{
    if (is_nibbles(coding)) {
        for (int i = 0; i < SIXTEEN; i++) {
            chunk[2 * i] = (uint8_t)(codes[i] | codes[16 + i] << 4);
            chunk[2 * i + 1] = (uint8_t)(codes[32 + i] | codes[48 + i] << 4);
        }
        return;
    }
    for (int i = 0; i < SIXTEEN; i++)
        for (int j = 0; j < 4; j++) chunk[4 * i + j] = codes[16 * j + i];
}

static void write_row(code_job *job, int64_t row, uint8_t *out)
{
    const mq_coding *coding = &job->out->coding;
    const mq_codec element = mq_format_get(job->matrix->scheme->element)->codec;
    const int64_t k = row < job->matrix->n ? job->matrix->k : 0, bytes = chunk_bytes(coding);
    uint8_t codes[MQ_CHUNK];
    for (int64_t i = 0; i < coding->row_codes / bytes; i++) {
        const int64_t count = MQ_MAX((int64_t)0, MQ_MIN((int64_t)MQ_CHUNK, k - i * MQ_CHUNK));
        memset(codes, 0, sizeof codes);
        if (count > 0) read_codes(job, row, i * MQ_CHUNK, count, codes);
        if (coding->kind == MQ_CODED_FLOATS && is_special(codes, count, element)) atomic_store(&job->bad, 1);
        write_chunk(coding, codes, out + i * bytes * MQ_ROWS_BESIDE);
    }
}

static void write_scales(code_job *job, int64_t row, void *out)
{
    const mq_coded_matrix *matrix = job->matrix;
    const mq_coding *coding = &job->out->coding;
    const int64_t in_row = MQ_CEIL_DIV(matrix->k, matrix->block_cols);
    const size_t size = scale_bytes(coding);
    const char *from = (const char *)matrix->scale + (size_t)(row / matrix->block_rows * in_row) * size;
    memset(out, 0, (size_t)coding->row_scales * size);
    if (row >= matrix->n) return;
    memcpy(out, from, (size_t)in_row * size);
    float *scales = out;
    for (int64_t i = 0; !coding->byte_scales && i < in_row; i++) {
        const float scale = scales[i];
        scales[i] *= job->factor;
        if (scales[i] / job->factor != scale) atomic_store(&job->bad, 1);
    }
    for (int64_t i = 0; coding->byte_scales && coding->kind == MQ_CODED_INTS && i < in_row; i++)
        if (((const uint8_t *)out)[i] - 1u < 31u) atomic_store(&job->bad, 1);   /* too small to be divided by 2^24 */
    if (matrix->scheme->scale == MQ_FMT_FP8_E4M3 && is_special(out, in_row, MQ_CODEC(FP8_E4M3)))
        atomic_store(&job->bad, 1);
}

/* A number as products see it: float32 with the bits of a unit, or half of one. */
static float rounded(const mq_coding *coding, float x)
{
    if (coding->half) x = mq_decode(mq_encode(x, MQ_CODEC(FP16)), MQ_CODEC(FP16));
    if (coding->bfloat) x = mq_decode(mq_encode(x, MQ_CODEC(BF16)), MQ_CODEC(BF16));
    return x;
}

static void write_table(const code_job *job)
{
    const mq_packed *b = job->out;
    const mq_coding *coding = &b->coding;
    char *table = (char *)b->data + coding->table;
    for (uint32_t code = 0; code < SCALES; code++) {
        float scale = job->matrix->scheme->scale == MQ_FMT_E8M0
            ? mq_decode(code, MQ_CODEC(E8M0)) : mq_decode(code, MQ_CODEC(FP8_E4M3)) * job->matrix->second;
        if (coding->kind != MQ_CODED_BY_TABLE) {
            scale *= job->factor;
            memcpy(table + code * sizeof scale, &scale, sizeof scale);
            continue;
        }
        for (uint32_t i = 0; i < SIXTEEN; i++) {
            const float number = rounded(coding, coding->values[i] * scale);
            const uint16_t half = (uint16_t)(mq_bits_of(number) >> 16);
            if (b->kernel->unit == MQ_UNIT_PAIR) memcpy(table + (code * SIXTEEN + i) * sizeof half, &half, sizeof half);
            else memcpy(table + (code * SIXTEEN + i) * sizeof number, &number, sizeof number);
        }
    }
}

/* The numbers of a row are looked at as a product would see them. */
static int is_finite(const mq_packed *b, int64_t row)
{
    _Alignas(64) uint32_t units[MQ_CHUNK];
    const mq_gemm_codes codes = mq_gemm_codes_at(b, row);
    const int pairs = b->kernel->unit == MQ_UNIT_PAIR, count = MQ_CHUNK / (pairs ? 2 : 1);
    const uint32_t low = pairs ? 0x7f80u : 0xffffffffu;     /* no bits are all of these */
    uint32_t bad = 0;
    for (int64_t chunk = 0; chunk < MQ_CEIL_DIV(b->k, (int64_t)MQ_CHUNK); chunk++) {
        b->kernel->helpers->decode(&codes, chunk, 1, units);
        for (int i = 0; i < count; i++)
            bad |= (uint32_t)((units[i] & 0x7f800000u) == 0x7f800000u) | (uint32_t)((units[i] & low) == low);
    }
    return bad == 0;
}

static void pack_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    code_job *job = argument;
    const mq_coding *coding = &job->out->coding;
    const unsigned state = keep_subnormals();
    (void)worker;
    for (int64_t row = begin; row < end; row++) {
        char *data = job->out->data;
        write_row(job, row, (uint8_t *)data + row_at(coding, row));
        write_scales(job, row, data + coding->scales + (size_t)(row * coding->row_scales) * scale_bytes(coding));
        if (!is_finite(job->out, row)) atomic_store(&job->bad, 1);
    }
    leave_subnormals(state);
}

int mq_gemm_pack_codes(mq_gemm_kind kind, const mq_coded_matrix *matrix, mq_packed *out)
{
    const mq_codec element = mq_format_get(matrix->scheme->element)->codec;
    code_job job = {.matrix = matrix, .out = out, .bits = element.bits, .factor = 1.0f};
    out->kind = kind;
    out->n = matrix->n;
    out->k = matrix->k;
    out->kernel = mq_gemm_kernel_of(kind);
    out->coding = coding_of(out->kernel, matrix);
    out->coding.bfloat = matrix->dtype == MQ_BF16 || kind == MQ_GEMM_BF16;
    if (out->coding.kind == MQ_CODED_INTS) job.factor = 0x1p-24f;
    if (out->coding.kind == MQ_CODED_FLOATS) job.factor = mq_float_of((uint32_t)(254 - element.bias) << 23);
    memset(out->data, 0, SLACK);
    memset((char *)out->data + out->coding.nbytes - SLACK, 0, SLACK);
    if (out->coding.byte_scales) write_table(&job);
    const int64_t grain = MQ_CEIL_DIV((int64_t)ROW_CHUNK_BYTES, MQ_MAX(out->coding.row_codes, (int64_t)1));
    mq_parallel_for(padded_rows(out->kernel, matrix->n), MQ_ROUND_UP(grain, (int64_t)MQ_ROWS_BESIDE), pack_rows, &job);
    return !atomic_load(&job.bad);
}

/* ---- products ---- */

mq_gemm_codes mq_gemm_codes_at(const mq_packed *b, int64_t n)
{
    const mq_coding *coding = &b->coding;
    const char *data = b->data;
    return (mq_gemm_codes){
        .coding = coding, .codes = (const uint8_t *)data + row_at(coding, n),
        .scales = data + coding->scales + (size_t)(n * coding->row_scales) * scale_bytes(coding),
        .table = data + coding->table,
    };
}

const char *mq_gemm_unpack_panel(const mq_packed *b, int64_t n, int64_t first, int64_t depth, uint32_t *stage)
{
    _Alignas(64) uint32_t rows[MQ_CODED_ROWS * (MQ_CODED_UNITS + 2 * MQ_CHUNK)];
    const int nr = b->kernel->nr;
    const int64_t units = MQ_CHUNK / mq_gemm_unit_elements(b->kernel), chunk = first / units;
    const int64_t end = MQ_MIN(MQ_CEIL_DIV(first + depth, units), MQ_CEIL_DIV(b->k, (int64_t)MQ_CHUNK));
    const int64_t width = (end - chunk) * units;
    const unsigned state = keep_subnormals();
    for (int row = 0; row < nr; row += MQ_CODED_ROWS) {
        for (int i = 0; i < MQ_CODED_ROWS; i++) {
            const mq_gemm_codes codes = mq_gemm_codes_at(b, n + row + i);
            b->kernel->helpers->decode(&codes, chunk, end - chunk, rows + i * width);
        }
        for (int64_t unit = 0; unit < width; unit += MQ_CODED_ROWS)
            b->kernel->helpers->transpose(rows + unit, width, stage + unit * nr + row, nr);
    }
    leave_subnormals(state);
    return (const char *)(stage + (first - chunk * units) * nr);
}

typedef struct few_job {
    const mq_gemm_args *args;
    mq_gemm_convert how;
    int64_t chunks;
    int m;                      /* padded */
} few_job;

static int padded_few(int64_t m)
{
    return m <= 2 ? (int)m : m <= 4 ? 4 : MQ_FEW_ROWS;
}

static size_t staged_bytes(const mq_gemm_args *args)
{
    const size_t width = (size_t)MQ_ROUND_UP(args->b->k, (int64_t)MQ_CHUNK);
    return (size_t)padded_few(args->m) * width * 4 / (size_t)mq_gemm_unit_elements(args->b->kernel);
}

int mq_gemm_is_few(const mq_gemm_args *args)
{
    if (args->b->coding.kind == MQ_NOT_CODED || args->m > MQ_FEW_ROWS || args->upper) return 0;
    return staged_bytes(args) <= MQ_GEMM_STAGE_BYTES;
}

static void stage_x(const few_job *job, char *stage)
{
    const mq_gemm_args *args = job->args;
    const int64_t width = job->chunks * MQ_CHUNK, element = (int64_t)mq_dtype_size(args->a_dtype);
    const int64_t nbytes = width * 4 / mq_gemm_unit_elements(args->b->kernel);
    for (int64_t i = 0; i < args->m; i++)
        args->b->kernel->helpers->convert(job->how, (const char *)args->a + i * args->lda * element, args->b->k,
                                          stage + i * nbytes, width);
    memset(stage + args->m * nbytes, 0, (size_t)((job->m - args->m) * nbytes));
}

/* Of scales without a sign: its lines would be missed one by one. */
static void prefetch_table(const mq_packed *b)
{
    const char *table = (const char *)b->data + b->coding.table;
    const size_t nbytes = table_bytes(&b->coding, b->kernel) / (b->coding.kind == MQ_CODED_BY_TABLE ? 2 : 1);
    for (size_t i = 0; i < nbytes; i += 64) __builtin_prefetch(table + i);
}

/* Panels [begin, end) of the result. */
static void run_panels(void *argument, int64_t begin, int64_t end, int worker)
{
    _Alignas(64) char stage[MQ_GEMM_STAGE_BYTES];
    _Alignas(64) float sums[MQ_FEW_ROWS * MQ_GEMM_MAX_NR];
    const few_job *job = argument;
    const mq_gemm_args *args = job->args;
    const mq_gemm_kernel *kernel = args->b->kernel;
    const unsigned state = keep_subnormals();
    (void)worker;
    prefetch_table(args->b);
    stage_x(job, stage);
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t at = panel * kernel->nr;
        const mq_gemm_dot dot = {
            .b = mq_gemm_codes_at(args->b, at), .chunks = job->chunks, .rows = kernel->nr, .x = stage, .m = job->m,
            .sums = sums, .ld = kernel->nr,
        };
        kernel->helpers->dot(&dot);
        const mq_gemm_store store = {
            .c = sums, .dtype = args->c_dtype, .ldo = args->ldc,
            .out = (char *)args->c + at * (int64_t)mq_dtype_size(args->c_dtype),
            .bias = args->bias ? args->bias + at : NULL, .alpha = args->alpha, .accumulate = args->accumulate,
            .rows = (int)args->m, .columns = (int)MQ_MIN((int64_t)kernel->nr, args->b->n - at),
        };
        kernel->helpers->store(&store);
    }
    leave_subnormals(state);
}

void mq_gemm_run_few(const mq_gemm_args *args)
{
    enum { INLINE_BYTES = 64 * 1024 };      /* waking the pool costs more than they do */
    const mq_packed *b = args->b;
    const few_job job = {.args = args, .how = mq_gemm_conversion(b->kernel, b->kind, args->a_dtype),
                         .m = padded_few(args->m), .chunks = MQ_CEIL_DIV(b->k, (int64_t)MQ_CHUNK)};
    const int64_t panels = MQ_CEIL_DIV(b->n, (int64_t)b->kernel->nr), threads = mq_pool_threads();
    const int64_t grain = b->n * b->coding.row_codes <= INLINE_BYTES || threads == 1 ? panels
                                                                                     : MQ_CEIL_DIV(panels, 4 * threads);
    mq_parallel_for(panels, grain, run_panels, (void *)&job);
}
