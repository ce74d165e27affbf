/* SPDX-License-Identifier: Apache-2.0 */
/* The fidelity meter's books: which blocks it measures, and the sums of what attend/meter.c finds. */
#include "cache/cache.h"

#include <math.h>

static size_t meter_bytes(const struct fkv_cache_object *cache) {
    return sizeof(struct fkv_meter) +
           (size_t)cache->profile->model.n_layers * sizeof(struct fkv_meter_sums);
}

fkv_status fkv_meter_start(struct fkv_cache_object *cache, double fraction) {
    const size_t bytes = meter_bytes(cache);
    struct fkv_meter *meter = NULL;
    if (fraction > 0.0) {
        meter = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, bytes);
        if (!meter)
            return fkv_cache_refused(cache);
        meter->fraction = fraction;
        meter->number = ++cache->meters;
    }
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, cache->meter, bytes);
    cache->meter = meter;
    return FKV_OK;
}

/* Every layer has as many chosen blocks as the fraction says, to one, for any length; a step of the golden ratio
 * from layer to layer keeps them from choosing the same places. */
int64_t fkv_meter_rank(const struct fkv_meter *meter, int layer, int64_t block) {
    const double golden = 0.61803398874989485, start = layer * golden;
    return (int64_t)floor((double)block * meter->fraction + (start - floor(start)));
}

static void add(struct fkv_meter_sums *to, const struct fkv_meter_sums *from) {
    to->blocks += from->blocks;
    to->missed += from->missed;
    to->samples += from->samples;
    to->block_error += from->block_error;
    to->block_energy += from->block_energy;
    to->block_max = fmax(to->block_max, from->block_max);
    to->lse += from->lse;
    to->lse_square += from->lse_square;
    to->lse_max = fmax(to->lse_max, from->lse_max);
    to->weight += from->weight;
    to->output_error += from->output_error;
    to->output_energy += from->output_energy;
    to->output_max = fmax(to->output_max, from->output_max);
}

/* 0 / 0 is no error: there was nothing to spoil. */
static double relative(double error, double energy) {
    return error > 0.0 ? sqrt(error / energy) : 0.0;
}

void fkv_meter_report(const struct fkv_cache_object *cache, int layer, fkv_fidelity *f) {
    struct fkv_meter_sums all = {0};
    for (int l = 0; l < cache->profile->model.n_layers; l++)
        if (layer == FKV_ALL_LAYERS || layer == l)
            add(&all, &cache->meter->sums[l]);
    const double n = all.samples ? (double)all.samples : 1.0;
    f->fraction = cache->meter->fraction;
    f->blocks = all.blocks;
    f->blocks_missed = all.missed;
    f->samples = all.samples;
    f->block_error = relative(all.block_error, all.block_energy);
    f->block_error_max = all.block_max;
    f->lse_bias = all.lse / n;
    f->lse_error = sqrt(all.lse_square / n);
    f->lse_error_max = all.lse_max;
    f->weight = all.weight / n;
    f->output_error = relative(all.output_error, all.output_energy);
    f->output_error_max = all.output_max;
}
