// report.h - draws a training run: plan.svg, and report.html in a single file without scripts or network.
// Include after snip.h; only its types are used. C99 or later, all functions static.
//
// Charts have no viewBox: positions are percentages of the frame and text keeps its size, so that a figure reads as
// well on a phone as on a screen. Only curves are stretched, in a nested 1000 x 1000 <svg>. Numbers are judged by their
// bits (report_ok), so that NaN and infinity are seen under -Ofast as well.
//
// INDEX (search for the tag)
//   >>report-runs >>report-numbers >>report-text >>report-grid >>report-maps >>report-charts >>report-style
//   >>report-page
#ifndef REPORT_H
#define REPORT_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// >>report-runs ------------------------------------------------------------------------------------
typedef struct {
    const char *name;
    int n;  // points in the five arrays below, each of which may be NULL
    const double *step, *loss;
    const double *val_loss;  // below 0: not evaluated in this step
    const double *tokens_per_s;
    const double *fp4_share;  // 0 to 1
    int n_layers;             // may be 0
    const snip_layer_info *layers;
    int n_plans;
    const double *plan_step;  // steps at which the plan switched
} report_run;

typedef struct {
    const char *key, *value;
} report_fact;

// >>report-numbers ---------------------------------------------------------------------------------
#define REPORT_NONE 1e300  // no value; report_ok refuses it, and comparing it is harmless

static int report_ok(double v) {  // finite, and small enough (2^257) to compute with
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    return (bits & 0x7FFFFFFFFFFFFFFFu) <= 0x5000000000000000u;
}

static double report_at(const double *a, int i) { return a && report_ok(a[i]) ? a[i] : REPORT_NONE; }

static int report_order(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double report_median(double *v, int n) {  // sorts v; n at least 1
    qsort(v, (size_t)n, sizeof *v, report_order);
    return (v[n / 2] + v[(n - 1) / 2]) / 2;
}

// The 1, 2 or 5 times a power of ten that divides range into about n parts.
static double report_nice(double range, int n) {
    double raw = range / n, power = pow(10, floor(log10(raw))), m = raw / power;
    return power * (m <= 1 ? 1 : m <= 2 ? 2 : m <= 5 ? 5 : 10);
}

// With commas between thousands; sign: with a plus where positive.
static void report_num(FILE *f, double v, int decimals, int sign) {
    char digits[48];
    double a = fabs(v);
    if (!report_ok(v)) {
        fputs("–", f);
        return;
    }
    if (a >= 1e7 || (a > 0 && a < 0.05 * pow(10, -decimals)))
        snprintf(digits, sizeof digits, "%.2e", a);
    else
        snprintf(digits, sizeof digits, "%.*f", decimals, a);
    if (v < 0)
        fputs("−", f);
    else if (sign)
        fputc('+', f);
    int lead = (int)strcspn(digits, ".e");
    for (int i = 0; digits[i]; i++) {
        if (lead > 4 && i > 0 && i < lead && (lead - i) % 3 == 0) fputc(',', f);
        fputc(digits[i], f);
    }
}

static void report_decade(FILE *f, int exponent) {  // 10 to the exponent
    static const char *const raised[10] = { "⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹" };
    int a = exponent < 0 ? -exponent : exponent;
    fputs(exponent < 0 ? "10⁻" : "10", f);
    if (a >= 100) fputs(raised[a / 100 % 10], f);
    if (a >= 10) fputs(raised[a / 10 % 10], f);
    fputs(raised[a % 10], f);
}

static void report_tick(FILE *f, double v, double spacing) {
    int digits = (int)ceil(-log10(spacing) - 1e-9);
    if (fabs(v) < spacing / 2) v = 0;
    if (fabs(v) >= 1e9)
        fprintf(f, "%.1e", v);
    else if (fabs(v) >= 1e6)
        fprintf(f, "%gM", v / 1e6);
    else if (fabs(v) >= 1e4)
        fprintf(f, "%gk", v / 1e3);
    else
        fprintf(f, "%.*f", digits < 0 ? 0 : digits > 9 ? 9 : digits, v);
}

// >>report-text ------------------------------------------------------------------------------------
// Bytes of the character at p; 0: not UTF-8, or a character that XML forbids.
static int report_character(const unsigned char *p, const unsigned char *end) {
    int length = 0;
    if (*p < 0x80) length = 1;
    if (*p >= 0xC2 && *p < 0xE0) length = 2;
    if (*p >= 0xE0 && *p < 0xF0) length = 3;
    if (*p >= 0xF0 && *p < 0xF5) length = 4;
    if (length == 0 || length > end - p) return 0;

    uint32_t c = length == 1 ? *p : *p & (0xFFu >> (length + 1));
    for (int i = 1; i < length; i++) {
        if ((p[i] & 0xC0) != 0x80) return 0;
        c = c << 6 | (p[i] & 0x3Fu);
    }
    if (c < 0x20 && c != '\t' && c != '\n' && c != '\r') return 0;
    if (c >= 0xD800 && c < 0xE000) return 0;   // halves of UTF-16 pairs
    if (c == 0xFFFE || c == 0xFFFF) return 0;  // no characters
    if (length == 3 && c < 0x800) return 0;    // longer than needed
    if (length == 4 && c < 0x10000) return 0;  // the same
    return c > 0x10FFFF ? 0 : length;
}

// Escaped for XML. Bytes that are not UTF-8 and characters that XML forbids become U+FFFD.
static void report_textn(FILE *f, const char *s, int n) {
    const unsigned char *p = (const unsigned char *)s, *end = p + n;
    while (p < end) {
        int length = report_character(p, end);
        if (length == 0)
            fputs("\xEF\xBF\xBD", f);
        else if (*p == '&')
            fputs("&amp;", f);
        else if (*p == '<')
            fputs("&lt;", f);
        else if (*p == '>')
            fputs("&gt;", f);
        else if (*p == '"')
            fputs("&quot;", f);
        else if (*p == '\'')
            fputs("&#39;", f);
        else
            fwrite(p, 1, (size_t)length, f);
        p += length ? length : 1;
    }
}

static void report_text(FILE *f, const char *s) {
    if (s) report_textn(f, s, (int)strlen(s));
}

static void report_tail(FILE *f, const char *s, int n, int most) {  // the last bytes, which tell names apart
    if (n > most) {
        fputs("…", f);
        s += n - most;
        for (n = most; n > 0 && ((unsigned char)*s & 0xC0) == 0x80; n--) s++;
    }
    report_textn(f, s, n);
}

static const char *report_name(const report_run *r) { return r->name && *r->name ? r->name : "run"; }

// >>report-grid ------------------------------------------------------------------------------------
// Maps have a row for each block and a column for each linear layer in it.
typedef struct {
    const char *name, *block, *key, *kind;  // "block.part.kind": key is part.kind; what is missing is empty
    int n_block, n_part;                    // bytes of block and part
    int row, col;
    int opens_row, opens_col;  // cell[y].opens_row is the layer that names row y, cell[x].opens_col column x
} report_cell;

typedef struct {
    report_cell *cell;  // [layers]
    int rows, cols;
    int gutter, head;  // pixels for the rows' and the columns' names
    int pitch, tall;   // pixels from row to row, and of the whole
    int slant;         // columns' names are slanted
} report_grid;

static void report_parse(report_cell *c, const char *name) {
    const char *dot = strrchr(name, '.');
    c->name = c->block = c->key = name;
    c->kind = dot ? dot + 1 : name;
    while (dot && dot > name && dot[-1] != '.') dot--;
    c->key = dot && dot > name ? dot : c->kind;
    c->n_block = c->key > name ? (int)(c->key - name) - 1 : 0;
    c->n_part = c->kind > c->key ? (int)(c->kind - c->key) - 1 : 0;
}

static int report_same_block(const report_cell *a, const report_cell *b) {
    return a->n_block == b->n_block && !memcmp(a->block, b->block, (size_t)a->n_block);
}

static int report_same_part(const report_cell *a, const report_cell *b) {
    return a->n_part == b->n_part && !memcmp(a->key, b->key, (size_t)a->n_part);
}

// Finds or opens the row and the column of layer i.
static void report_place(report_grid *g, int i) {
    report_cell *c = g->cell;
    int y = 0, x = 0;
    while (y < g->rows && !report_same_block(&c[i], &c[c[y].opens_row])) y++;
    while (x < g->cols && strcmp(c[i].key, c[c[x].opens_col].key)) x++;
    if (y == g->rows) c[g->rows++].opens_row = i;
    if (x == g->cols) c[g->cols++].opens_col = i;
    c[i].row = y;
    c[i].col = x;
}

static int report_taken(const report_grid *g, int i) {  // by a layer before i
    const report_cell *c = g->cell;
    for (int j = 0; j < i; j++)
        if (c[j].row == c[i].row && c[j].col == c[i].col) return 1;
    return 0;
}

// Names without structure, or a name used twice: one layer a row.
static void report_flatten(report_grid *g, int n) {
    report_cell *c = g->cell;
    g->rows = n;
    g->cols = 1;
    for (int i = 0; i < n; i++) {
        c[i].n_block = (int)strlen(c[i].name);
        c[i].n_part = c[i].col = c[i].opens_col = 0;
        c[i].row = c[i].opens_row = i;
        c[i].key = c[i].kind = c[i].name + c[i].n_block;
    }
}

// "model.layers." before every block goes without saying.
static void report_shorten(report_grid *g, int n) {
    report_cell *c = g->cell;
    int common = 1 << 30;
    for (int i = 0; i < n; i++) {
        int dot = 0;
        for (int j = 0; j < c[i].n_block && c[i].block[j] == c[0].block[j]; j++)
            if (c[i].block[j] == '.') dot = j + 1;
        if (dot < common) common = dot;
    }
    for (int i = 0; i < n; i++) {
        c[i].block += common;
        c[i].n_block -= common;
    }
}

static int report_grid_make(report_grid *g, const report_run *r) {  // nonzero: out of memory

    enum { MOST_COLUMNS = 24, MOST_CHECKED = 4000 };  // layers up to which a name used twice is looked for

    int n = r->n_layers > 0 && r->layers ? r->n_layers : 0, longest = 4, kinds = 0, parts = 0, flat = 0;
    report_cell *c = (report_cell *)calloc((size_t)n + 1, sizeof *c);
    memset(g, 0, sizeof *g);
    g->cell = c;
    if (!c) return 1;
    for (int i = 0; i < n; i++) {
        report_parse(&c[i], r->layers[i].name ? r->layers[i].name : "");
        report_place(g, i);
        if (n < MOST_CHECKED && !flat) flat = report_taken(g, i);
    }
    if (g->cols > MOST_COLUMNS || flat) report_flatten(g, n);
    report_shorten(g, n);
    for (int i = 0; i < n; i++) {
        int kind = (int)strlen(c[i].kind);
        if (c[i].n_block > longest) longest = c[i].n_block;
        if (kind > kinds) kinds = kind;
        parts |= c[i].n_part > 0;
    }
    g->gutter = 18 + 7 * (longest > 18 ? 19 : longest);
    g->pitch = g->rows <= 16 ? 24 : g->rows <= 32 ? 18 : g->rows <= 64 ? 12 : 6;
    g->slant = kinds > 6 || g->cols > 8;
    g->head = (parts ? 24 : 0) + (g->slant ? 16 + 5 * (kinds > 14 ? 15 : kinds) : 22);
    g->tall = g->head + g->rows * g->pitch + (g->cols <= 8 ? 14 : 4);
    return 0;
}

// >>report-maps ------------------------------------------------------------------------------------
// A picture that stands alone needs these rules too, hence plain colours. .f* are formats, .t is strong text.
#define REPORT_CSS_MAP                                                                                        \
    ".map text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#5d6570;"                  \
    "font-variant-numeric:tabular-nums}"                                                                      \
    ".map .t{fill:#191c20}.map .s{font-size:9px;letter-spacing:.02em}.map .h{font-size:19px;font-weight:600}" \
    ".map rect,.map circle{fill:currentColor;shape-rendering:crispEdges}.map line{stroke:#cdd2d9}"            \
    ".f4{color:#2a5fc0}.f8{color:#f2b84b}.f6{color:#5fa8a0}.f16{color:#ccd2da}.f32{color:#eef0f3}"            \
    ".fx,.map .bad{color:#fff;stroke:#8a929d;stroke-dasharray:2 2}"                                           \
    ".paper{color:#fff}@media(prefers-color-scheme:dark){.map text{fill:#9aa3af}.map .t{fill:#e8eaed}"        \
    ".map line{stroke:#3b424c}"                                                                               \
    ".f4{color:#5b93f5}.f8{color:#d9982b}.f6{color:#4f9a92}.f16{color:#4b535f}.f32{color:#2b313a}"            \
    ".fx,.map .bad{color:#15171b;stroke:#7d8691}.paper{color:#15171b}}"

enum { REPORT_LEVELS = 30 };  // colours of a divergence

typedef enum { REPORT_PLAN, REPORT_DLOSS, REPORT_DUPDATE } report_what;

enum { REPORT_FORMATS = 6 };

static const struct {
    const char *name, *css;
} report_formats[REPORT_FORMATS] = {
  // smallest first, as in the legends
    {"FP4",    "f4" },
    { "FP6",   "f6" },
    { "FP8",   "f8" },
    { "BF16",  "f16"},
    { "F32",   "f32"},
    { "other", "fx" },
};

static int report_format(snip_format x) {
    switch (x) {
        case SNIP_E2M1: return 0;
        case SNIP_E2M3:
        case SNIP_E3M2: return 1;
        case SNIP_E4M3:
        case SNIP_E5M2: return 2;
        case SNIP_BF16: return 3;
        case SNIP_F32: return 4;
        default: return 5;
    }
}

// What a map shows of layer i: of GEMM 0, 1 or 2, in FP4 or else FP8.
static double report_divergence(const report_run *r, int i, report_what what, int fp4, int gemm) {
    const snip_estimate *e = fp4 ? &r->layers[i].fp4 : &r->layers[i].fp8;
    double v = REPORT_NONE;
    if (what == REPORT_DUPDATE)
        v = e->update[gemm];
    else if (report_ok(e->loss_first) && report_ok(e->loss_second))
        v = e->loss_first + e->loss_second;
    return report_ok(v) ? v : REPORT_NONE;
}

// Decades *low..*high that hold the divergences of both precisions, five at most; 0: there are none.
static int report_decades(const report_run *r, report_what what, int *low, int *high) {
    double least = REPORT_NONE, most = 0;
    for (int i = 0; i < r->n_layers * 6; i++) {
        double v = fabs(report_divergence(r, i / 6, what, i & 1, i / 2 % 3));
        if (!report_ok(v) || v <= 1e-60) continue;
        if (v < least) least = v;
        if (v > most) most = v;
    }
    if (most <= 0) return 0;
    *low = (int)floor(log10(least) + 1e-9);
    *high = (int)ceil(log10(most) - 1e-9);
    if (*high <= *low) *high = *low + 1;
    if (*high - *low > 5) *low = *high - 5;
    return 1;
}

typedef struct {
    report_what what;
    int fp4;        // or else FP8; not of a plan
    int low, high;  // decades
} report_scale;

// The parts' names over their columns, and the kinds' over theirs. wide: percent from column to column; inner: of a
// cell.
static void report_map_heads(FILE *f, const report_grid *g, double wide, double inner) {
    const report_cell *c = g->cell;
    for (int x = 0; x < g->cols; x++) {
        const report_cell *a = &c[c[x].opens_col];
        if (a->n_part && (x == 0 || !report_same_part(a, &c[c[x - 1].opens_col]))) {
            int n = 1;
            while (x + n < g->cols && report_same_part(a, &c[c[x + n].opens_col])) n++;
            fprintf(f,
                    "<line x1=\"%.2f%%\" x2=\"%.2f%%\" y1=\"18\" y2=\"18\"/>"
                    "<text x=\"%.2f%%\" y=\"11\" text-anchor=\"middle\">",
                    x * wide, (x + n - 1) * wide + inner, x * wide + ((n - 1) * wide + inner) / 2);
            report_tail(f, a->key, a->n_part, 8 * n);
            fputs("</text>\n", f);
        }
        if (g->slant)
            fprintf(f, "<svg x=\"%.2f%%\" y=\"%d\" overflow=\"visible\"><text class=\"t\" transform=\"rotate(-40)\">",
                    x * wide + inner * .4, g->head - 7);
        else
            fprintf(f, "<text class=\"t\" x=\"%.2f%%\" y=\"%d\" text-anchor=\"middle\">", x * wide + inner / 2,
                    g->head - 8);
        report_tail(f, a->kind, (int)strlen(a->kind), 14);
        fputs(g->slant ? "</text></svg>\n" : "</text>\n", f);
    }
}

// The blocks' names, as many as have room.
static void report_map_rows(FILE *f, const report_grid *g, int height) {
    const report_cell *c = g->cell;
    int every = g->pitch >= 13 ? 1 : g->pitch >= 7 ? 2 : 5;
    if (g->rows && *c->key) fprintf(f, "<text x=\"-10\" y=\"%d\" text-anchor=\"end\">block</text>\n", g->head - 8);
    for (int y = 0; y < g->rows; y += every) {
        fprintf(f, "<text class=\"t\" x=\"-10\" y=\"%d\" dy=\".36em\" text-anchor=\"end\">",
                g->head + y * g->pitch + height / 2);
        report_tail(f, c[c[y].opens_row].block, c[c[y].opens_row].n_block, 18);
        fputs("</text>\n", f);
    }
}

// What the reader's pointer is told over a cell.
static void report_cell_title(FILE *f, const snip_layer_info *l, const char *name, const report_scale *scale,
                              const double v[3], int parts) {
    static const char *const gemm[3] = { "forward", "dgrad", "wgrad" };
    const snip_estimate *e = scale->fp4 ? &l->fp4 : &l->fp8;
    fputs("<g><title>", f);
    report_text(f, name);
    if (scale->what == REPORT_PLAN)
        fprintf(f, " (%.0f × %.0f, stage %d):", (double)l->out_features, (double)l->in_features, l->stage);
    else
        fprintf(f, " in %s:", scale->fp4 ? "FP4" : "FP8");
    for (int j = 0; j < parts; j++) {
        if (scale->what != REPORT_DLOSS) fprintf(f, "%s %s ", j ? "," : "", gemm[j]);
        if (scale->what == REPORT_PLAN)
            fputs(report_formats[report_format(l->format[j])].name, f);
        else if (!report_ok(v[j]))
            fputs(" not a number", f);
        else
            fprintf(f, scale->what == REPORT_DLOSS ? " loss %+.2e" : "%.2e", v[j]);
    }
    if (scale->what == REPORT_DLOSS && report_ok(v[0]))
        fprintf(f, " (first order %+.2e, curvature %+.2e)", e->loss_first, e->loss_second);
    fputs("</title>", f);
}

static int report_level(const report_scale *scale, double v) {  // the colour of a divergence
    double a = fabs(v);
    int level = 0;
    if (a > 1e-60) level = (int)floor(REPORT_LEVELS * (log10(a) - scale->low) / (scale->high - scale->low));
    return level < 0 ? 0 : level < REPORT_LEVELS ? level : REPORT_LEVELS - 1;
}

// The inside of a map's <svg>, whose width is that of the cells; row names hang out to the left.
static void report_map(FILE *f, const report_run *r, const report_grid *g, const report_scale *scale) {
    const report_cell *c = g->cell;
    const int parts = scale->what == REPORT_DLOSS ? 1 : 3;
    const int height = g->pitch - (g->pitch > 16 ? 4 : g->pitch > 8 ? 2 : 1);
    const double wide = 100.0 / g->cols, inner = wide * (g->cols > 1 ? 0.93 : 0.985), part = inner / parts;
    report_map_heads(f, g, wide, inner);
    report_map_rows(f, g, height);
    for (int i = 0; i < r->n_layers; i++) {
        const snip_layer_info *l = &r->layers[i];
        double x = c[i].col * wide, v[3];
        int y = g->head + c[i].row * g->pitch;
        for (int j = 0; j < parts; j++) v[j] = report_divergence(r, i, scale->what, scale->fp4, j);
        report_cell_title(f, l, c[i].name, scale, v, parts);
        for (int j = 0; j < parts; j++) {
            fprintf(f, "<rect x=\"%.2f%%\" y=\"%d\" width=\"%.2f%%\" height=\"%d\" class=\"", x + j * part, y,
                    part * (parts > 1 ? 0.95 : 1), height);
            if (scale->what == REPORT_PLAN)
                fputs(report_formats[report_format(l->format[j])].css, f);
            else if (!report_ok(v[j]))
                fputs("bad", f);
            else
                fprintf(f, "h%d", report_level(scale, v[j]));
            fputs("\"/>", f);
        }
        if (scale->what == REPORT_DLOSS && report_ok(v[0]) && v[0] < 0)
            fprintf(f, "<circle class=\"neg\" cx=\"%.2f%%\" cy=\"%.1f\" r=\"%.1f\"/>", x + inner / 2, y + height / 2.0,
                    height > 8 ? 3.5 : 2.0);
        fputs("</g>\n", f);
    }
    for (int x = 0; x < g->cols && parts == 3 && g->cols <= 8; x++)
        for (int j = 0; j < 3; j++)
            fprintf(f, "<text class=\"s\" x=\"%.2f%%\" y=\"%d\" text-anchor=\"middle\">%c</text>",
                    x * wide + inner * (2 * j + 1) / 6, g->head + g->rows * g->pitch + 8, "FDW"[j]);
}

// Percent of the linear layers' FLOPs in each of report_formats.
static void report_shares(const report_run *r, double share[REPORT_FORMATS]) {
    double total = 0;
    for (int k = 0; k < REPORT_FORMATS; k++) share[k] = 0;
    for (int i = 0; r->layers && i < r->n_layers * 3; i++) {
        const snip_layer_info *l = &r->layers[i / 3];
        double flops = (double)l->out_features * (double)l->in_features;
        if (!(flops > 0)) flops = 1;
        share[report_format(l->format[i % 3])] += flops;
        total += flops;
    }
    for (int k = 0; k < REPORT_FORMATS && total > 0; k++) share[k] *= 100 / total;
}

static void report_svg_legend(FILE *f, const double share[REPORT_FORMATS]) {
    for (int i = 0, x = 32; i < REPORT_FORMATS; i++)
        if (share[i] > 0) {
            fprintf(f,
                    "<rect class=\"%s\" x=\"%d\" y=\"61\" width=\"12\" height=\"12\"/>"
                    "<text x=\"%d\" y=\"71\"><tspan class=\"t\">%s</tspan> %.1f%%</text>\n",
                    report_formats[i].css, x, x + 19, report_formats[i].name, share[i]);
            x += 110;
        }
}

// Heat map of the plan, to stand alone in light and dark. 0, or nonzero: write error or out of memory.
static int report_write_plan_svg(FILE *f, const report_run *run) {
    static const report_scale plan = { REPORT_PLAN, 0, 0, 1 };
    report_grid g;
    double share[REPORT_FORMATS];
    if (report_grid_make(&g, run)) return -1;
    int cells = g.cols * 84 < 560 ? 560 : g.cols * 84, left = g.gutter + 22, width = left + cells + 32, top = 100;
    int height = g.rows ? top + g.tall + 44 : 120;
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"map\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "
            "role=\"img\">\n<title>Precision plan of ",
            width, height, width, height);
    report_text(f, report_name(run));
    fputs(": format of every linear layer's forward, dgrad and wgrad GEMM</title>\n"
          "<style>:root{color-scheme:light dark}" REPORT_CSS_MAP "</style>\n",
          f);
    fprintf(f,
            "<rect class=\"paper\" width=\"%d\" height=\"%d\" rx=\"8\"/>\n"
            "<text class=\"t h\" x=\"32\" y=\"42\">Precision plan</text>\n",
            width, height);
    if (g.rows) {
        report_shares(run, share);
        report_svg_legend(f, share);
        fprintf(f, "<svg x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" overflow=\"visible\">\n", left, top, cells,
                g.tall);
        report_map(f, run, &g, &plan);
        fprintf(f,
                "</svg>\n<text x=\"%d\" y=\"%d\">F forward · D input gradient · W weight gradient. "
                "Shares are of linear-layer FLOPs.</text>\n",
                left, height - 22);
    } else
        fputs("<text x=\"32\" y=\"72\">This run has no linear layers under a plan.</text>\n", f);
    fputs("</svg>\n", f);
    free(g.cell);
    return fflush(f) != 0 || ferror(f) != 0;
}

// >>report-charts ----------------------------------------------------------------------------------
typedef enum { REPORT_LOSS, REPORT_LATE, REPORT_SHARE, REPORT_SPEED } report_view;

typedef struct {
    double x0, x1, y0, y1;  // steps and values at the frame's edges
    int cut;                // values lie beyond the upper edge
} report_box;

static double report_val(const report_run *r, int i) {
    double v = report_at(r->val_loss, i);
    return report_ok(v) && v >= 0 && report_ok(report_at(r->step, i)) ? v : REPORT_NONE;
}

static double report_raw(const report_run *r, report_view view, int i) {
    const double *of = view == REPORT_SHARE ? r->fp4_share : view == REPORT_SPEED ? r->tokens_per_s : r->loss;
    double v = report_at(of, i);
    if (!report_ok(v) || !report_ok(report_at(r->step, i))) return REPORT_NONE;
    if ((view == REPORT_SPEED && v <= 0) || (view == REPORT_SHARE && v < 0)) return REPORT_NONE;
    return view == REPORT_SHARE ? 100 * v : v;
}

// Mean over a twentieth of the run around i, narrower towards the first step so that the start is not bent.
static double report_smooth(const report_run *r, report_view view, int i) {
    int half = r->n / 40 > 2 ? r->n / 40 : 2, n = 0;
    if (half > i) half = i;
    if (r->n < 12 || view == REPORT_SHARE) half = 0;
    double sum = 0;
    for (int j = i - half; j <= i + half && j < r->n; j++) {
        double v = report_raw(r, view, j);
        if (!report_ok(v)) continue;
        sum += v;
        n++;
    }
    return n && report_ok(report_raw(r, view, i)) ? sum / n : REPORT_NONE;
}

static double report_clamp(double v) { return v < -2000 ? -2000 : v > 3000 ? 3000 : v; }

// In thousandths of the frame.
static double report_x(const report_box *b, double step) {
    return report_clamp(1000 * (step - b->x0) / (b->x1 - b->x0));
}

static double report_y(const report_box *b, double v) { return report_clamp(1000 * (b->y1 - v) / (b->y1 - b->y0)); }

// The points of a long raw series that a curve keeps of begin .. end - 1: its smallest and largest, in order; -1: none.
static void report_extremes(const report_run *r, report_view view, int begin, int end, int kept[2]) {
    int least = -1, most = -1;
    for (int j = begin; j < end; j++) {
        double v = report_raw(r, view, j);
        if (!report_ok(v)) continue;
        if (least < 0 || v < report_raw(r, view, least)) least = j;
        if (most < 0 || v > report_raw(r, view, most)) most = j;
    }
    kept[0] = least < most ? least : most;
    kept[1] = least < most ? most : least;
}

// One curve, at most about a thousand points.
static void report_curve(FILE *f, const report_run *r, report_view view, const report_box *b, int smooth,
                         const char *css) {
    int per = r->n > 1000 ? (r->n + 499) / 500 : 1, pen = 0, drawn = 0, kept[2];
    for (int i = 0; i < r->n; i += per) {
        int end = i + per < r->n ? i + per : r->n;
        if (smooth)
            kept[0] = kept[1] = end == r->n ? r->n - 1 : i;
        else
            report_extremes(r, view, i, end, kept);
        for (int k = 0; k < 1 + (kept[0] != kept[1]); k++) {
            int j = kept[k];
            double v = j < 0 ? REPORT_NONE : smooth ? report_smooth(r, view, j) : report_raw(r, view, j);
            if (!report_ok(v)) {
                pen = 0;
                continue;
            }
            if (!drawn) fprintf(f, "<path class=\"%s\" d=\"", css);
            double x = report_x(b, r->step[j]), y = report_y(b, v);
            if (!pen)
                fprintf(f, "M%.1f,%.1fh.1", x, y);  // a lone point still shows as a dot
            else if (view == REPORT_SHARE)
                fprintf(f, "H%.1fV%.1f", x, y);
            else
                fprintf(f, "L%.1f,%.1f", x, y);
            pen = drawn = 1;
        }
    }
    if (drawn) fputs("\"/>\n", f);
}

static void report_frame_steps(report_box *b, const report_run *runs, int n_runs, report_view view) {
    b->x0 = REPORT_NONE;
    b->x1 = -REPORT_NONE;
    for (int k = 0; k < n_runs; k++)
        for (int i = 0; i < runs[k].n; i++) {
            double x = report_at(runs[k].step, i);
            if (!report_ok(x)) continue;
            if (x < b->x0) b->x0 = x;
            if (x > b->x1) b->x1 = x;
        }
    if (!report_ok(b->x0)) {
        b->x0 = 0;
        b->x1 = 1;
    }
    if (b->x1 - b->x0 < 1e-6 * (fabs(b->x0) + fabs(b->x1)) + 1e-9) {
        double margin = 0.5 + 1e-3 * fabs(b->x0);
        b->x0 -= margin;
        b->x1 += margin;
    }
    if (view == REPORT_LATE) b->x0 = (b->x0 + b->x1) / 2;
}

typedef struct {
    double first;  // largest first value of a run
    double least, most;
    double calmest;  // least of the runs' largest values
} report_range;

// Of what the frame shows: smoothed values, and validation losses.
static report_range report_range_of(const report_box *b, const report_run *runs, int n_runs, report_view view) {
    report_range range = { -REPORT_NONE, REPORT_NONE, -REPORT_NONE, REPORT_NONE };
    for (int k = 0; k < n_runs; k++) {
        const report_run *r = &runs[k];
        double worst = -REPORT_NONE;
        int per = r->n > 1000 ? r->n / 500 : 1, started = 0;
        for (int i = 0; i < r->n; i++) {
            double v[2] = { REPORT_NONE, REPORT_NONE };
            if (!report_ok(report_at(r->step, i)) || r->step[i] < b->x0) continue;
            if (i % per == 0 || i == r->n - 1) v[0] = report_smooth(r, view, i);
            if (view <= REPORT_LATE) v[1] = report_val(r, i);
            for (int j = 0; j < 2; j++) {
                if (!report_ok(v[j])) continue;
                if (!started && v[j] > range.first) range.first = v[j];
                if (v[j] < range.least) range.least = v[j];
                if (v[j] > worst) worst = v[j];
                started = 1;
            }
        }
        if (worst > range.most) range.most = worst;
        if (report_ok(worst) && worst < range.calmest) range.calmest = worst;
    }
    if (!report_ok(range.least)) {
        range.least = 0;
        range.most = range.calmest = range.first = 1;
    }
    return range;
}

// A run that diverges must not press the others flat: the frame ends above the starting loss, or above the calm runs.
static void report_frame(report_box *b, const report_run *runs, int n_runs, report_view view) {
    report_frame_steps(b, runs, n_runs, view);
    report_range range = report_range_of(b, runs, n_runs, view);
    double least = range.least, top = range.most;
    double limit = view == REPORT_LOSS ? range.first + 0.25 * fabs(range.first)
                                       : least + 2.5 * (range.calmest - least) + 0.02 * fabs(least);
    b->cut = view <= REPORT_LATE && top > limit && limit > least;
    if (b->cut) top = limit;
    if (view >= REPORT_SHARE) least = 0;
    double tall = top - least, tiny = 1e-4 * (fabs(top) + fabs(least)) + 1e-9;
    if (tall < tiny) {
        top += tiny;
        least -= tiny;
        tall = top - least;
    }
    b->y0 = view == REPORT_SHARE ? -4 : view == REPORT_SPEED ? 0 : least - 0.06 * tall;
    b->y1 = view == REPORT_SHARE ? 104 : b->cut ? top : top + 0.08 * tall;
}

// bf16 is the reference, in grey; snip has the accent.
static const char *report_color(const report_run *runs, int i) {
    static const char *const colors[7] = { "c1", "c2", "c3", "c4", "c5", "c6", "c7" };
    int others = 0;
    if (!strcmp(report_name(&runs[i]), "bf16")) return "ck";
    if (!strcmp(report_name(&runs[i]), "snip")) return "c0";
    for (int j = 0; j < i; j++)
        others += strcmp(report_name(&runs[j]), "bf16") && strcmp(report_name(&runs[j]), "snip");
    return colors[others % 7];
}

static void report_axes(FILE *f, const report_box *b, report_view view) {
    enum { MOST = 14 };  // marks of an axis

    double spacing = report_nice(b->y1 - b->y0, 6), first = ceil(b->y0 / spacing - 1e-9);
    for (int j = 0; j < MOST && (first + j) * spacing <= b->y1 + 1e-9 * spacing; j++) {
        double v = (first + j) * spacing, y = report_y(b, v) / 10;
        fprintf(f,
                "<line x2=\"100%%\" y1=\"%.2f%%\" y2=\"%.2f%%\"/>"
                "<text x=\"-10\" y=\"%.2f%%\" dy=\".35em\" text-anchor=\"end\">",
                y, y, y);
        report_tick(f, v, spacing);
        fputs(view == REPORT_SHARE ? "%</text>\n" : "</text>\n", f);
    }
    spacing = report_nice(b->x1 - b->x0, 7);
    if (spacing < 1 && b->x1 - b->x0 >= 1) spacing = 1;
    first = ceil(b->x0 / spacing - 1e-9);
    for (int j = 0; j < MOST && (first + j) * spacing <= b->x1 + 1e-9 * spacing; j++) {
        double v = (first + j) * spacing;
        fprintf(f, "<text x=\"%.2f%%\" y=\"100%%\" dy=\"20\" text-anchor=\"middle\">", report_x(b, v) / 10);
        report_tick(f, v, spacing);
        fputs("</text>\n", f);
    }
    fputs("<text x=\"100%\" y=\"100%\" dy=\"38\" text-anchor=\"end\">step</text>\n", f);
}

static void report_switches(FILE *f, const report_box *b, const report_run *r, const char *color) {
    for (int i = 0; i < r->n_plans; i++) {
        double x = report_at(r->plan_step, i);
        if (!report_ok(x) || x < b->x0 || x > b->x1) continue;
        x = report_x(b, x) / 10;
        fprintf(f, "<line class=\"sw %s\" x1=\"%.2f%%\" x2=\"%.2f%%\" y1=\"0\" y2=\"100%%\"/>\n", color, x, x);
    }
}

// Rings at the validation losses, a hundred at most.
static void report_validations(FILE *f, const report_box *b, const report_run *r, const char *color) {
    int count = 0, seen = 0;
    for (int i = 0; i < r->n; i++) count += report_ok(report_val(r, i));
    for (int i = 0; i < r->n; i++) {
        double v = report_val(r, i), x = report_ok(v) ? r->step[i] : 0;
        if (!report_ok(v) || (count - ++seen) % (count / 100 + 1) || x < b->x0 || v > b->y1) continue;
        fprintf(f, "<circle class=\"%s\" cx=\"%.2f%%\" cy=\"%.2f%%\" r=\"3.2\"><title>", color, report_x(b, x) / 10,
                report_y(b, v) / 10);
        report_text(f, report_name(r));
        fprintf(f, ", step %g: validation loss %.4f</title></circle>\n", x, v);
    }
}

static void report_chart(FILE *f, const report_run *runs, int n_runs, report_view view, const char *heading,
                         const char *caption) {
    report_box b;
    report_frame(&b, runs, n_runs, view);
    fprintf(f,
            "<figure><h3>%s</h3><div class=\"plot\">"
            "<svg role=\"img\" aria-label=\"%s over training steps\" width=\"100%%\" height=\"100%%\">\n",
            heading, heading);
    report_axes(f, &b, view);
    for (int k = 0; k < n_runs; k++) report_switches(f, &b, &runs[k], report_color(runs, k));
    fputs("<svg viewBox=\"0 0 1000 1000\" preserveAspectRatio=\"none\" width=\"100%\" height=\"100%\">\n", f);
    for (int smooth = 0; smooth < 2; smooth++)  // all raw curves lie under all smoothed ones
        for (int k = 0; k < n_runs; k++) {
            char css[24];
            if (!smooth && (view == REPORT_SHARE || view == REPORT_LATE)) continue;
            snprintf(css, sizeof css, "%s %s", smooth ? "ln" : "raw", report_color(runs, k));
            report_curve(f, &runs[k], view, &b, smooth, css);
        }
    fputs("</svg>\n", f);
    for (int k = 0; k < n_runs && view <= REPORT_LATE; k++) report_validations(f, &b, &runs[k], report_color(runs, k));
    fprintf(f, "</svg></div><figcaption>%s%s</figcaption></figure>\n", caption,
            b.cut ? " Values beyond the upper edge are not drawn." : "");
}

// >>report-style -----------------------------------------------------------------------------------
// The colours of magma (van der Walt, Smith), their ends kept off the background.
static void report_levels(FILE *f, int dark) {
    static const uint32_t stop[2][10] = {
        {0xFCF4C9,  0xFEDC9F, 0xFEB57C, 0xFB8861, 0xEE605E, 0xD1426F, 0xA8327D, 0x802582, 0x57157E, 0x2C115F},
        { 0x261C4A, 0x451077, 0x641A80, 0x8C2981, 0xB73779, 0xDE4968, 0xF7705C, 0xFE9F6D, 0xFECF92, 0xFCFDBF},
    };
    for (int k = 0; k < REPORT_LEVELS; k++) {
        double t = 8.999 * k / (REPORT_LEVELS - 1), c[3];
        for (int j = 0; j < 3; j++) {
            uint32_t a = stop[dark][(int)t] >> (16 - 8 * j) & 255, b = stop[dark][(int)t + 1] >> (16 - 8 * j) & 255;
            c[j] = a + (t - (int)t) * ((double)b - a);
        }
        fprintf(f, ".h%d{color:#%02x%02x%02x}", k, (unsigned)c[0], (unsigned)c[1], (unsigned)c[2]);
    }
    fputc('\n', f);
}

// The page and what stands in it as text.
static const char report_css_page[] =
    "<style>\n"
    ":root{color-scheme:light dark;--bg:#fff;--ink:#191c20;--mute:#5d6570;--rule:#e3e6ea}\n"
    "body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,"
    "sans-serif;-webkit-text-size-adjust:100%}\n"
    "main{max-width:1040px;margin:0 auto;padding:56px 24px 96px}*{box-sizing:border-box}\n"
    "h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;font-weight:650;margin:0;overflow-wrap:anywhere}\n"
    "h2{font-size:20px;letter-spacing:-.005em;font-weight:620;margin:72px 0 4px}"
    "h3{font-size:14px;font-weight:600;margin:0 0 12px}\n"
    "p,figcaption{color:var(--mute);margin:0;max-width:74ch;font-size:14px;text-wrap:pretty}"
    "figure{margin:0;min-width:0}figcaption{font-size:13px;line-height:1.5;margin-top:12px}\n"
    ".head{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:28px 32px;margin:36px 0 0;"
    "padding:0}\n"
    ".head div{border-top:2px solid var(--ink);padding-top:10px}.head dt{font-size:13px;color:var(--mute)}"
    ".head dd{margin:0;font-size:30px;line-height:1.25;font-weight:600;\n"
    "letter-spacing:-.02em;font-variant-numeric:tabular-nums}"
    ".head small{display:block;font-size:13px;font-weight:400;letter-spacing:0;color:var(--mute);margin-top:2px}\n"
    ".facts{columns:2 340px;column-gap:48px;margin:16px 0 0}"
    ".facts div{display:flex;justify-content:space-between;gap:24px;padding:7px 0;"
    "border-bottom:1px solid var(--rule);\n"
    "break-inside:avoid;font-size:14px}.facts dt{color:var(--mute);flex:none;max-width:50%;overflow-wrap:anywhere}"
    ".facts dd{margin:0;text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}\n"
    ".scroll{overflow-x:auto;margin-top:16px}"
    "table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}\n"
    "th,td{text-align:right;padding:8px 0 8px 22px;border-bottom:1px solid var(--rule);white-space:nowrap;"
    "font-weight:400}th:first-child,td:first-child{text-align:left;padding-left:0}\n"
    "thead th{color:var(--mute);white-space:normal;font-size:13px;vertical-align:bottom}tbody th{font-weight:600}"
    "td small{color:var(--mute);font-size:13px;margin-left:8px}\n"
    ".num{font-size:12.5px}.num th,.num td{padding:4px 0 4px 16px}.num tbody th{font-weight:400}\n"
    "i{display:inline-block;width:18px;height:3px;border-radius:2px;background:currentColor;vertical-align:middle;"
    "margin-right:9px}\n";

// Legends, charts and maps.
static const char report_css_parts[] =
    ".legend{list-style:none;margin:16px 0 28px;padding:0;display:flex;flex-wrap:wrap;gap:6px 26px;font-size:14px}"
    ".legend span{color:var(--ink)}.legend em{font-style:normal;color:var(--mute)}\n"
    ".legend i.sq{width:12px;height:12px;border-radius:0}"
    ".legend i.dot{width:9px;height:9px;border-radius:50%;background:none;border:1.75px solid}"
    ".legend i.thin{height:1px;opacity:.6}\n"
    ".legend i.vert{width:0;height:15px;background:none;border-left:1.5px dashed currentColor;border-radius:0}"
    ".legend .m{color:var(--mute)}\n"
    ".grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:48px 56px}"
    ".plot{height:264px;padding:4px 6px 44px 46px}\n"
    ".plot svg{overflow:visible;display:block}.plot svg svg{overflow:hidden}"
    ".plot text{font-size:12px;fill:var(--mute);font-variant-numeric:tabular-nums}.plot line{stroke:var(--rule)}\n"
    ".plot path{fill:none;stroke:currentColor;vector-effect:non-scaling-stroke;stroke-linejoin:round;"
    "stroke-linecap:round}.plot .ln{stroke-width:2}.plot .raw{stroke-width:1;opacity:.22}\n"
    ".plot circle{fill:var(--bg);stroke:currentColor;stroke-width:1.75}"
    ".plot line.sw{stroke:currentColor;stroke-width:1.2;stroke-dasharray:3 4;opacity:.75}\n"
    "details{margin-top:72px}summary{cursor:pointer;list-style-position:outside}summary h2{display:inline;margin:0}"
    "details>p{margin:6px 0 0}\n"
    "details.sub{margin-top:40px}details.sub summary{font-size:14px;font-weight:600}"
    ".map svg{display:block;overflow:visible}.map .neg{fill:var(--bg);stroke:var(--ink);shape-rendering:auto}\n"
    ".plan{max-width:760px}"
    ".pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:36px 56px;"
    "margin-top:20px}.block{margin-top:48px}\n"
    ".pair h4{font-size:13px;font-weight:400;color:var(--mute);margin:0 0 8px}.bar{max-width:380px;margin-top:14px}\n"
    ".ck{color:#4a515b}.c0{color:#2a5fc0}.c1{color:#0b8f6b}.c2{color:#d4570b}.c3{color:#a5478f}.c4{color:#c08a00}"
    ".c5{color:#2f9fd8}.c6{color:#8a5a3c}.c7{color:#6d5bd0}\n";

// Colours by night.
static const char report_css_dark[] =
    "\n@media(prefers-color-scheme:dark){:root{--bg:#15171b;--ink:#e8eaed;--mute:#9aa3af;--rule:#2a2f37}\n"
    ".ck{color:#b3bac4}.c0{color:#5b93f5}.c1{color:#2fb98f}.c2{color:#f0803c}.c3{color:#d482c2}.c4{color:#dcae3a}"
    ".c5{color:#6cc4f0}.c6{color:#bd8f70}.c7{color:#a397f0}\n";

// On a phone, and on paper.
static const char report_css_narrow[] =
    "}@media(max-width:520px){main{padding:32px 16px 64px}h1{font-size:25px}"
    ".head{grid-template-columns:1fr 1fr;gap:22px 20px}.head dd{font-size:24px}.plot{height:240px;padding-left:40px}"
    "h2{margin-top:56px}\n"
    "summary{list-style-position:inside}table{font-size:13px}th,td{padding-left:8px}td small{display:block}"
    "i{width:10px;margin-right:6px}}\n"
    "@media print{details{break-inside:avoid}}\n"
    "</style>\n";

static void report_style(FILE *f) {
    fputs(report_css_page, f);
    fputs(report_css_parts, f);
    report_levels(f, 0);
    fputs(REPORT_CSS_MAP, f);
    fputs(report_css_dark, f);
    report_levels(f, 1);
    fputs(report_css_narrow, f);
}

// >>report-page ------------------------------------------------------------------------------------
typedef struct {
    double train, val, speed, share;  // last 20 steps' mean, last validation, median, last
} report_end;

static report_end report_finish(const report_run *r) {
    report_end e = { REPORT_NONE, REPORT_NONE, REPORT_NONE, REPORT_NONE };
    double sum = 0, *speeds = (double *)malloc((size_t)(r->n > 0 ? r->n : 1) * sizeof *speeds);
    int n = 0;
    for (int i = 0; i < r->n; i++) {
        double val = report_at(r->val_loss, i), speed = report_raw(r, REPORT_SPEED, i), loss = report_at(r->loss, i);
        if (r->val_loss && !(report_ok(val) && val < 0)) e.val = val;  // evaluated, but not a number: no final loss
        if (speeds && report_ok(speed)) speeds[n++] = speed;
        if (i >= r->n - 20)  // a NaN at the end must not vanish
            sum = report_ok(loss) && report_ok(sum) ? sum + loss : REPORT_NONE;
    }
    if (r->n > 0) {
        e.train = report_ok(sum) ? sum / (r->n < 20 ? r->n : 20) : REPORT_NONE;
        e.share = report_raw(r, REPORT_SHARE, r->n - 1);
    }
    if (n) e.speed = report_median(speeds, n);
    free(speeds);
    return e;
}

static void report_results(FILE *f, const report_run *runs, int n_runs, const report_end *base) {
    fprintf(f,
            "<h2>Result</h2>\n<div class=\"scroll\"><table><thead><tr><th>Run</th><th>Training loss</th>"
            "<th>Validation loss</th>%s<th>FP4 share</th><th>Tokens/s</th></tr></thead><tbody>\n",
            base ? "<th>Gap to bf16</th>" : "");
    for (int k = 0; k < n_runs; k++) {
        report_end e = report_finish(&runs[k]);
        int is_base = !strcmp(report_name(&runs[k]), "bf16");
        fprintf(f, "<tr><th><i class=\"%s\"></i>", report_color(runs, k));
        report_text(f, report_name(&runs[k]));
        fputs("</th><td>", f);
        report_num(f, e.train, 3, 0);
        fputs("</td><td>", f);
        report_num(f, e.val, 4, 0);
        if (base) {
            int comparable = !is_base && report_ok(e.val) && report_ok(base->val);
            fputs("</td><td>", f);
            report_num(f, comparable ? e.val - base->val : REPORT_NONE, 4, 1);
        }
        fputs("</td><td>", f);
        report_num(f, e.share, 1, 0);
        if (report_ok(e.share)) fputs("%", f);
        fputs("</td><td>", f);
        report_num(f, e.speed, 0, 0);
        if (base && !is_base && report_ok(e.speed) && report_ok(base->speed)) {
            fputs("<small>", f);
            report_num(f, e.speed / base->speed, 2, 0);
            fputs("×</small>", f);
        }
        fputs("</td></tr>\n", f);
    }
    fprintf(f,
            "</tbody></table></div>\n<figcaption>Training loss: mean of the last 20 steps. "
            "Validation loss: the last one evaluated. Tokens/s: median%s.</figcaption>\n",
            base ? ", and as a multiple of bf16’s. "
                   "The gap is in validation loss; one run each, so a small gap may be noise"
                 : "");
}

static void report_maps(FILE *f, const report_run *r, const report_grid *g, report_what what, const char *heading,
                        const char *caption) {
    report_scale scale = { what, 0, 0, 1 };
    if (!report_decades(r, what, &scale.low, &scale.high)) return;
    fprintf(f,
            "<figure class=\"block\"><h3>%s</h3><p>%s</p><div class=\"map bar\">"
            "<svg role=\"img\" aria-label=\"colour scale\" width=\"100%%\" height=\"30\">",
            heading, caption);
    for (int j = 0; j < REPORT_LEVELS; j++)
        fprintf(f, "<rect class=\"h%d\" x=\"%.2f%%\" width=\"%.2f%%\" height=\"9\"/>", j, 100.0 * j / REPORT_LEVELS,
                100.4 / REPORT_LEVELS);
    for (int e = scale.low; e <= scale.high; e++) {
        const char *anchor = e == scale.low ? "start" : e == scale.high ? "end" : "middle";
        fprintf(f, "<text x=\"%.2f%%\" y=\"25\" text-anchor=\"%s\">",
                100.0 * (e - scale.low) / (scale.high - scale.low), anchor);
        report_decade(f, e);
        fputs("</text>", f);
    }
    fputs("</svg></div>\n<div class=\"pair\">", f);
    for (scale.fp4 = 0; scale.fp4 < 2; scale.fp4++) {
        const char *format = scale.fp4 ? "FP4" : "FP8";
        fprintf(f,
                "<div><h4>if the layer ran in %s</h4><div class=\"map\" style=\"padding:0 %dpx 0 %dpx\">"
                "<svg role=\"img\" aria-label=\"%s, %s\" width=\"100%%\" height=\"%d\">\n",
                format, g->slant * 20, g->gutter, heading, format, g->tall);
        report_map(f, r, g, &scale);
        fputs("</svg></div></div>\n", f);
    }
    fputs("</div></figure>\n", f);
}

static void report_plan_figure(FILE *f, const report_run *r, const report_grid *g) {
    static const report_scale plan = { REPORT_PLAN, 0, 0, 1 };
    double share[REPORT_FORMATS];
    report_shares(r, share);
    fputs("<figure class=\"block plan\"><h3>Plan at the end of the run</h3><ul class=\"legend\">", f);
    for (int i = 0; i < REPORT_FORMATS; i++)
        if (share[i] > 0)
            fprintf(f, "<li class=\"%s\"><i class=\"sq\"></i><span>%s</span> <em>%.1f%%</em></li>",
                    report_formats[i].css, report_formats[i].name, share[i]);
    fprintf(f,
            "</ul>\n<div class=\"map\" style=\"padding:0 %dpx 0 %dpx\">"
            "<svg role=\"img\" aria-label=\"Precision plan\" width=\"100%%\" height=\"%d\">\n",
            g->slant * 20, g->gutter, g->tall);
    report_map(f, r, g, &plan);
    fputs("</svg></div><figcaption>One row per block, one cell per linear layer, split into its three GEMMs: "
          "<b>F</b>orward, <b>D</b> input gradient, <b>W</b> weight gradient. "
          "Shares are of the linear layers’ FLOPs.</figcaption></figure>\n",
          f);
}

static void report_numbers(FILE *f, const report_run *r, const report_grid *g) {
    fputs("<details class=\"sub\"><summary>All numbers</summary><div class=\"scroll\"><table class=\"num\"><thead>"
          "<tr><th>Layer</th><th>Plan F D W</th><th>Loss, FP8</th><th>Loss, FP4</th>"
          "<th>Update F, FP8</th><th>D</th><th>W</th><th>Update F, FP4</th><th>D</th><th>W</th></tr></thead><tbody>\n",
          f);
    for (int i = 0; i < r->n_layers; i++) {
        fputs("<tr><th>", f);
        report_text(f, g->cell[i].name);
        fputs("</th><td>", f);
        for (int j = 0; j < 3; j++)
            fprintf(f, "%s%s", j ? " " : "", report_formats[report_format(r->layers[i].format[j])].name);
        for (int j = 0; j < 8; j++) {
            double v = j < 2 ? report_divergence(r, i, REPORT_DLOSS, j, 0)
                             : report_divergence(r, i, REPORT_DUPDATE, j > 4, (j - 2) % 3);
            if (report_ok(v))
                fprintf(f, j < 2 ? "</td><td>%+.2e" : "</td><td>%.2e", v);
            else
                fputs("</td><td>–", f);
        }
        fputs("</td></tr>\n", f);
    }
    fputs("</tbody></table></div></details>", f);
}

static void report_layers(FILE *f, const report_run *r, const report_grid *g, int open) {
    int low, high;
    int measured = report_decades(r, REPORT_DLOSS, &low, &high) | report_decades(r, REPORT_DUPDATE, &low, &high);
    fprintf(f, "<details%s><summary><h2>Layers of ", open || measured ? " open=\"open\"" : "");
    report_text(f, report_name(r));
    fputs("</h2></summary>\n", f);
    report_plan_figure(f, r, g);
    if (!measured) {
        fputs("<p class=\"block\">No layer was measured in this run.</p></details>\n", f);
        return;
    }
    report_maps(f, r, g, REPORT_DLOSS, "Loss divergence",
                "Estimated change of the loss if this layer’s forward GEMM alone ran in the lower precision, at the "
                "last measurement: first order plus curvature. Colour is its size; a ring marks an estimate below "
                "zero, a dashed cell the lack of a finite one.");
    report_maps(f, r, g, REPORT_DUPDATE, "Update divergence",
                "Estimated relative squared error of the whole model’s next optimizer update if this one GEMM ran in "
                "the lower precision.");
    report_numbers(f, r, g);
    fputs("</details>\n", f);
}

// What the page begins with. bf16: the run that is the reference, or NULL.
static void report_headline(FILE *f, const report_run *r, const report_run *bf16) {
    report_end e = report_finish(r), base = { REPORT_NONE, REPORT_NONE, REPORT_NONE, REPORT_NONE };
    if (bf16 && bf16 != r) base = report_finish(bf16);
    fputs("<dl class=\"head\"><div><dt>Validation loss</dt><dd>", f);
    report_num(f, e.val, 3, 0);
    fputs("<small>", f);
    if (report_ok(e.val) && report_ok(base.val)) {
        report_num(f, e.val - base.val, 4, 1);
        fputs(" against bf16", f);
    } else {
        fputs("training loss ", f);
        report_num(f, e.train, 3, 0);
    }
    fputs("</small></dd></div><div><dt>FP4 share</dt><dd>", f);
    report_num(f, e.share, 1, 0);
    fprintf(f, "%s<small>of linear-layer FLOPs</small></dd></div><div><dt>Tokens per second</dt><dd>",
            report_ok(e.share) ? "%" : "");
    report_num(f, e.speed, 0, 0);
    fputs("<small>median", f);
    if (report_ok(e.speed) && report_ok(base.speed)) {
        fputs(", ", f);
        report_num(f, e.speed / base.speed, 2, 0);
        fputs("× bf16", f);
    }
    fprintf(f, "</small></dd></div><div><dt>Plans</dt><dd>%d<small>", r->n_plans);
    double last = r->n_plans > 0 ? report_at(r->plan_step, r->n_plans - 1) : REPORT_NONE;
    if (report_ok(last))
        fprintf(f, "last switch at step %g", last);
    else
        fputs("no plan was solved", f);
    fputs("</small></dd></div></dl>\n", f);
}

static void report_setup(FILE *f, const report_fact *facts, int n) {
    fputs("<h2>Setup</h2>\n<dl class=\"facts\">", f);
    for (int i = 0; i < n; i++) {
        fputs("<div><dt>", f);
        report_text(f, facts[i].key);
        fputs("</dt><dd>", f);
        report_text(f, facts[i].value);
        fputs("</dd></div>\n", f);
    }
    fputs("</dl>\n", f);
}

static void report_training(FILE *f, const report_run *runs, int n_runs) {
    int switches = 0;
    fputs("<h2>Training</h2>\n<ul class=\"legend\">", f);
    for (int k = 0; k < n_runs; k++) {
        fprintf(f, "<li class=\"%s\"><i></i><span>", report_color(runs, k));
        report_text(f, report_name(&runs[k]));
        fputs("</span></li>", f);
        switches |= runs[k].n_plans > 0;
    }
    fprintf(f,
            "<li class=\"m\"><i class=\"thin\"></i>every step</li><li class=\"m\"><i class=\"dot\"></i>validation</li>"
            "%s</ul>\n<div class=\"grid\">\n",
            switches ? "<li class=\"m\"><i class=\"vert\"></i>plan switched</li>" : "");
    report_chart(f, runs, n_runs, REPORT_LOSS, "Loss",
                 "Training loss, smoothed over about a twentieth of the run, on top of every step; "
                 "rings are validation loss.");
    report_chart(f, runs, n_runs, REPORT_LATE, "Loss, second half",
                 "The same from half-way on, enlarged, without the single steps.");
    report_chart(f, runs, n_runs, REPORT_SHARE, "FP4 share",
                 "Share of the linear layers’ FLOPs that the plan in force runs in FP4.");
    report_chart(f, runs, n_runs, REPORT_SPEED, "Tokens per second",
                 "Speed on this machine, which need not have FP4 or FP8 units.");
    fputs("</div>\n", f);
}

// The run that the page is about: the one called snip, or that of the most plans, or the first; -1: there is none.
static int report_hero(const report_run *runs, int n_runs) {
    int hero = -1;
    for (int k = 0; k < n_runs; k++) {
        int named = !strcmp(report_name(&runs[k]), "snip");
        if (hero < 0 || named || (runs[k].n_plans > runs[hero].n_plans && strcmp(report_name(&runs[hero]), "snip")))
            hero = k;
    }
    return hero;
}

// The whole report. 0, or nonzero: write error or out of memory.
static int report_write_html(FILE *f, const char *title, const report_run *runs, int n_runs, const report_fact *facts,
                             int n_facts) {
    int hero = report_hero(runs, n_runs), failed = 0;
    const report_run *bf16 = NULL;
    report_end base = { REPORT_NONE, REPORT_NONE, REPORT_NONE, REPORT_NONE };
    for (int k = 0; k < n_runs; k++)
        if (!strcmp(report_name(&runs[k]), "bf16")) bf16 = &runs[k];
    if (bf16) base = report_finish(bf16);
    if (!title || !*title) title = "Training report";
    fputs("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>"
          "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"/><title>",
          f);
    report_text(f, title);
    fputs("</title>\n", f);
    report_style(f);
    fputs("</head><body><main>\n<h1>", f);
    report_text(f, title);
    fputs("</h1>\n", f);
    if (hero >= 0) report_headline(f, &runs[hero], bf16);
    if (n_facts > 0) report_setup(f, facts, n_facts);
    if (n_runs > 0) {
        report_results(f, runs, n_runs, bf16 ? &base : NULL);
        report_training(f, runs, n_runs);
    }
    for (int others = 0; others < 2; others++)  // the main run's layers first
        for (int k = 0; k < n_runs && !failed; k++) {
            report_grid g;
            if (runs[k].n_layers <= 0 || !runs[k].layers || (k != hero) != others) continue;
            failed = report_grid_make(&g, &runs[k]);
            if (failed) continue;
            report_layers(f, &runs[k], &g, k == hero);
            free(g.cell);
        }
    fputs("</main></body></html>\n", f);
    return failed || fflush(f) != 0 || ferror(f) != 0;
}
#endif  // REPORT_H
