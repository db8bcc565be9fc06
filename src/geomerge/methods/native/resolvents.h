/* Sums of resolvents of a tridiagonal matrix (methods/roots.py): blocks on the diagonal of S = Σ wₜ (T + t)⁻¹, and what the rest is made of.
 *
 * With the pivots p of T + t from below, and b beside its diagonal, each element of M = (T + t)⁻¹ is the one above it times hᵢ = −bᵢ₋₁/pᵢ,
 * and Mᵢᵢ = 1/pᵢ + hᵢ²Mᵢ₋₁,ᵢ₋₁. So for j before a place e, and i from there on, Mᵢⱼ = (wMⱼⱼhⱼ₊₁…hₑ₋₁)(hₑ…hᵢ). Nothing is subtracted. */

#pragma once

/* Of one shift: h, the first of which is 0, and w times M's diagonal. */
static void hops_of(int64_t n, const double *diagonal, const double *beside, double shift, double weight, double *hops, double *own) {
    double pivot = diagonal[n - 1] + shift;
    for (int64_t i = n - 1; i > 0; i--) {
        hops[i] = -beside[i - 1] / pivot;
        own[i] = 1 / pivot;
        pivot = diagonal[i - 1] + shift + hops[i] * beside[i - 1];
    }
    hops[0] = 0;
    own[0] = 1 / pivot;
    for (int64_t i = 1; i < n; i++) own[i] = own[i] + hops[i] * hops[i] * own[i - 1];
    EACH(n) own[i] = own[i] * weight;
}

/* `edges`: where blocks of at most CHUNK rows begin, and n. `out`: n rows, of which the blocks' upper triangles are set. `ends` and `starts`:
 * a row for each shift; wMⱼⱼhⱼ₊₁…h to the end of j's block, and hₑ…hᵢ from the start of i's. */
void geomerge_resolvents(int64_t n, const double *diagonal, const double *beside, int64_t shifts, const double *shift, const double *weight,
                         const int64_t *edges, double *starts, double *ends, double *out) {
    for (int64_t t = 0; t < shifts; t++) hops_of(n, diagonal, beside, shift[t], weight[t], starts + t * n, ends + t * n);
    for (int64_t from = 0; from < n; from = *edges) {
        const int64_t to = *++edges;
        for (int64_t i = from; i < to; i++) {
            double sum[CHUNK] = {0};
            for (int64_t t = 0; t < shifts; t++) {
                double *end = ends + t * n + from;
                const double hop = starts[t * n + i];
                for (int64_t j = 0; j < i - from; j++) end[j] = end[j] * hop;
                for (int64_t j = 0; j <= i - from; j++) sum[j] = sum[j] + end[j];
            }
            for (int64_t j = from; j <= i; j++) out[j * n + i] = sum[j - from];
        }
        for (int64_t t = 0; t < shifts; t++)
            for (int64_t i = from + 1; i < to; i++) starts[t * n + i] = starts[t * n + i - 1] * starts[t * n + i];
    }
}
