// stats.h - what the benchmarks compute with: seconds, medians, rank correlations and Student's t.
//
// Define _POSIX_C_SOURCE 200809L or _DEFAULT_SOURCE before the first include.
#ifndef STATS_H
#define STATS_H

#include <math.h>
#include <stdlib.h>
#include <time.h>

// One thread: processor time, so that a shared machine disturbs less.
static inline double stats_seconds(int threads) {
    struct timespec t;
    clock_gettime(threads > 1 ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline int stats_by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static inline double stats_median(double *x, int n) {  // sorts x; of an even number the upper one
    qsort(x, (size_t)n, sizeof *x, stats_by_value);
    return x[n / 2];
}

static inline double stats_mean(const double *x, int n) {
    double mean = 0;
    for (int i = 0; i < n; i++) mean += x[i] / n;
    return mean;
}

// Ranks, ties averaged.
static inline void stats_ranks(const double *x, int n, double *rank) {
    for (int i = 0; i < n; i++) {
        int below = 0, equal = 0;
        for (int j = 0; j < n; j++) {
            below += x[j] < x[i];
            equal += x[j] == x[i];
        }
        rank[i] = below + 0.5 * (equal - 1);
    }
}

static inline double stats_pearson(const double *x, const double *y, int n) {
    double mean_x = stats_mean(x, n), mean_y = stats_mean(y, n), xy = 0, xx = 0, yy = 0;
    for (int i = 0; i < n; i++) {
        xy += (x[i] - mean_x) * (y[i] - mean_y);
        xx += (x[i] - mean_x) * (x[i] - mean_x);
        yy += (y[i] - mean_y) * (y[i] - mean_y);
    }
    return xx > 0 && yy > 0 ? xy / sqrt(xx * yy) : 0;
}

static inline double stats_spearman(const double *x, const double *y, int n) {
    double *rank = (double *)malloc((size_t)(2 * n + 1) * sizeof *rank), correlation = 0;
    if (!rank) return 0;
    stats_ranks(x, n, rank);
    stats_ranks(y, n, rank + n);
    correlation = stats_pearson(rank, rank + n, n);
    free(rank);
    return correlation;
}

static inline double stats_kendall(const double *x, const double *y, int n) {  // tau-a
    double agree = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++) agree += ((x[i] > x[j]) - (x[i] < x[j])) * ((y[i] > y[j]) - (y[i] < y[j]));
    return n > 1 ? agree / (0.5 * n * (n - 1)) : 0;
}

// Two-sided 95% quantile of Student's t.
static inline double stats_student(int freedom) {
    static const double t[] = { 0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228 };
    return freedom < 1 ? 0 : freedom <= 10 ? t[freedom] : 1.96 + 2.5 / freedom;
}

// Half width of the 95% interval of the mean of n differences.
static inline double stats_half_width(const double *x, int n) {
    double mean = stats_mean(x, n), spread = 0;
    for (int i = 0; i < n; i++) spread += (x[i] - mean) * (x[i] - mean);
    return n > 1 ? stats_student(n - 1) * sqrt(spread / (n - 1) / n) : 0;
}
#endif  // STATS_H
