/* One row of a schedule, on the device: what `latentrt.sampling.schedule.Recurrence` does, float32 operation for operation.
 *
 * Compiled to PTX, which any driver turns into code for its GPU:
 *
 *     nvcc -ptx -arch=compute_75 --fmad=false -o row.ptx row.cu     (then `.version` is set to 6.4, which suffices)
 *
 * Products and sums are rounded one by one (no fused multiply-add), so a picture does not depend on where its latents
 * were. The cursor and the table are data in device memory: one recorded step serves every row of every table.
 */

#ifdef __cplusplus
extern "C" {
#endif

/* The columns of a row; the weights of the memory follow. */
enum { T, C_IN, P, Q, LIMIT, U, W, A, E, D, S, SCALE, B };

/* What the denoiser is told: the scaled latents, twice where there is guidance, and the timestep of each evaluation. */
__global__ void show(float *sample, float *timestep, const float *latents, const float *table, const int *cursor,
                     int width, int count, int evaluations, int guided)
{
    const float *row = table + (long long)*cursor * width;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < evaluations)
        timestep[i] = row[T];
    if (i >= count)
        return;
    float scaled = row[C_IN] * latents[i];
    sample[i] = scaled;
    if (guided)
        sample[count + i] = scaled;
}

/* From x_k to x_{k+1}. A coefficient of zero skips its array, which may hold anything. `broken` keeps the number of the
 * first row, counted from 1, that gave what is not a finite number. */
__global__ void advance(float *latents, float *previous, float *history, const float *output, const float *noise,
                        const float *table, const int *cursor, int *broken, int width, int memory, int count,
                        int guided)
{
    int k = *cursor, i = blockIdx.x * blockDim.x + threadIdx.x, j;
    const float *row = table + (long long)k * width;
    if (i >= count)
        return;
    float x = latents[i], m = output[i], y = 0.0f, h = 0.0f, next = 0.0f, sound = m - m;
    if (guided) {
        /* The negative prompt's half comes first. */
        float positive = output[count + i], apart = positive - m, pushed = row[SCALE] * apart;
        sound += positive - positive;
        m = m + pushed;
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
        next += row[E] * previous[i];
    if (row[D] != 0.0f)
        next += row[D] * m;
    for (j = 0; j < memory; j++)
        if (row[B + j] != 0.0f && j <= k)
            next += row[B + j] * history[(long long)((k - j) % memory) * count + i];
    if (row[S] != 0.0f)
        next += row[S] * noise[i];
    previous[i] = x;
    latents[i] = next;
    sound += next - next;
    if (sound != 0.0f && *broken == 0) /* not a number is not equal to zero */
        *broken = k + 1;
}

/* The next row. */
__global__ void turn(int *cursor)
{
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *cursor += 1;
}

#ifdef __cplusplus
}
#endif
