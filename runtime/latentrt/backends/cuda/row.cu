/* One row of a schedule for every sample of a batch, as `latentrt.sampling.schedule.Recurrence` computes it: the same
 * float32 operations in the same order.
 *
 * Compiled to PTX, which any driver compiles for its GPU:
 *
 *     nvcc -ptx -arch=compute_75 --fmad=false -o row.ptx row.cu
 *
 * Then `.version` is set to 6.4, which suffices, and the first line is set to `// of row.cu, sha256 …`.
 *
 * Products and sums are rounded one by one (no fused multiply-add), so an image does not depend on where its latents
 * were. Every sample has a slot with a table, a row index and memory of its own. Slots are data in device memory, so
 * one recorded step serves every sampler, every row and every mix of samples.
 */

#ifdef __cplusplus
extern "C" {
#endif

/* The columns of a table; the weights b of the history follow. */
enum { T, C_IN, P, Q, LIMIT, U, W, A, E, D, S, SCALE, B };

/* One sample under way; `_SLOT` in device_loop.py is the same structure. */
typedef struct {
    float *latents;       /* x_k, count numbers */
    float *previous;      /* x_{k-1} */
    float *history;       /* h of the last `memory` rows, a ring: row k is at k % memory */
    const float *noise;   /* z_k */
    const float *table;   /* rows of `width` columns */
    int *row_index;       /* k */
    int *nonfinite_row;   /* the first row, counted from 1, that gave a value that is not finite; 0: none */
    int width, memory;
    int positive;         /* index of the slot's evaluation in the batch; -1: the slot takes no part in this step */
    int negative;         /* index of its negative evaluation; -1: this row is not guided */
} Slot;

/* Write the scaled latents and the timestep of every evaluation of a batch. `slot_of` is the slot of each evaluation;
 * those that pad the batch repeat a slot. `stride` is the distance between the evaluations of `input`: channels that
 * follow the `count` numbers of the latents are left as they are. */
__global__ void model_input(float *input, float *timesteps, const Slot *slots, const int *slot_of, int count,
                            int stride, int evaluations)
{
    int thread = blockIdx.x * blockDim.x + threadIdx.x, evaluation = thread / count, i = thread % count;
    if (evaluation >= evaluations)
        return;
    const Slot *slot = slots + slot_of[evaluation];
    const float *row = slot->table + (long long)*slot->row_index * slot->width;
    float scaled = 0.0f;
    if (row[C_IN] != 0.0f)
        scaled += row[C_IN] * slot->latents[i];
    input[(long long)evaluation * stride + i] = scaled;
    if (i == 0)
        timesteps[evaluation] = row[T];
}

/* Guide the outputs [evaluations, count] and compute x_{k+1} of every slot that takes part. A coefficient of zero skips
 * its array, which may hold anything. */
__global__ void advance(const Slot *slots, const float *output, int count, int size)
{
    int thread = blockIdx.x * blockDim.x + threadIdx.x, i = thread % count, j;
    if (thread / count >= size)
        return;
    const Slot *slot = slots + thread / count;
    if (slot->positive < 0)
        return;
    int k = *slot->row_index, memory = slot->memory;
    const float *row = slot->table + (long long)k * slot->width;
    float *history = slot->history;
    float x = slot->latents[i], m = output[(long long)slot->positive * count + i];
    float y = 0.0f, h = 0.0f, next = 0.0f, defect = m - m; /* 0 as long as every value is finite */
    if (slot->negative >= 0) {
        float negative = output[(long long)slot->negative * count + i];
        float difference = m - negative, scaled = row[SCALE] * difference;
        defect += negative - negative;
        m = negative + scaled;
    }
    if (row[P] != 0.0f)
        y += row[P] * x;
    if (row[Q] != 0.0f)
        y += row[Q] * m;
    if (row[LIMIT] - row[LIMIT] == 0.0f) { /* finite */
        if (y > row[LIMIT])
            y = row[LIMIT];
        if (y < -row[LIMIT])
            y = -row[LIMIT];
    }
    if (row[U] != 0.0f)
        h += row[U] * x;
    if (row[W] != 0.0f)
        h += row[W] * y;
    if (memory > 0)
        history[(long long)(k % memory) * count + i] = h;
    if (row[A] != 0.0f)
        next += row[A] * x;
    if (row[E] != 0.0f)
        next += row[E] * slot->previous[i];
    if (row[D] != 0.0f)
        next += row[D] * m;
    for (j = 0; j < memory && j <= k; j++)
        if (row[B + j] != 0.0f)
            next += row[B + j] * history[(long long)((k - j) % memory) * count + i];
    if (row[S] != 0.0f)
        next += row[S] * slot->noise[i];
    slot->previous[i] = x;
    slot->latents[i] = next;
    defect += next - next;
    if (defect != 0.0f && *slot->nonfinite_row == 0) /* NaN is not equal to zero */
        *slot->nonfinite_row = k + 1;
}

/* Move every slot that took part to its next row. */
__global__ void next_row(const Slot *slots, int size)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size && slots[i].positive >= 0)
        *slots[i].row_index += 1;
}

#ifdef __cplusplus
}
#endif
