// stats.h - rank correlations and Student's t, shared by fidelity.c and quality.c.
#ifndef STATS_H
#define STATS_H
#include <math.h>
#include <stdlib.h>

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
    double mx = 0, my = 0, xy = 0, xx = 0, yy = 0;
    for (int i = 0; i < n; i++) {
        mx += x[i] / n;
        my += y[i] / n;
    }
    for (int i = 0; i < n; i++) {
        xy += (x[i] - mx) * (y[i] - my);
        xx += (x[i] - mx) * (x[i] - mx);
        yy += (y[i] - my) * (y[i] - my);
    }
    return xx > 0 && yy > 0 ? xy / sqrt(xx * yy) : 0;
}

static inline double stats_spearman(const double *x, const double *y, int n) {
    double *rank = (double *)malloc((size_t)(2 * n + 1) * sizeof *rank), r = 0;
    if (!rank) return 0;
    stats_ranks(x, n, rank);
    stats_ranks(y, n, rank + n);
    r = stats_pearson(rank, rank + n, n);
    free(rank);
    return r;
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
    double mean = 0, spread = 0;
    for (int i = 0; i < n; i++) mean += x[i] / n;
    for (int i = 0; i < n; i++) spread += (x[i] - mean) * (x[i] - mean);
    return n > 1 ? stats_student(n - 1) * sqrt(spread / (n - 1) / n) : 0;
}
#endif  // STATS_H
