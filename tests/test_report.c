// test_report.c - the report's files: well-formed, self-contained, escaped, and whole at the extremes.
//   test_report          runs the tests
//   test_report DIR      also writes sample reports into DIR, to be looked at
#include "test.h"
#include "../snip.h"
#include "../examples/report.h"

static double from_bits(uint64_t u) {
    double v;
    memcpy(&v, &u, sizeof v);
    return v;
}  // -Ofast cannot fold these

#define NOT_A_NUMBER from_bits(0x7FF8000000000000u)
#define INFINITE from_bits(0x7FF0000000000000u)

static double uniform(void) { return (double)(random_bits() >> 11) / 9007199254740992.0; }

static double normal(void) { return sqrt(-2 * log(uniform() + 1e-300)) * cos(6.283185307179586 * uniform()); }

// ---- synthetic runs ------------------------------------------------------------------------------------------------
enum { MOST_LAYERS = 1400 };

typedef struct {
    report_run run;
    double *data;
    snip_layer_info *layers;
    char (*names)[48];
} sample;

static void sample_free(sample *s) {
    free(s->data);
    free(s->layers);
    free(s->names);
}

// gap: added to the loss; share: -1 for a run whose plan comes from measurements, reaching 0.75.
static sample sample_make(const char *name, int n, int blocks, double gap, double speed, double share, uint64_t seed) {
    static const char *const part[7] = { "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down" };
    static const double fragile[7] = { 0.5, 0.4, 3, 2, 1, 1.2, 4 };
    sample s;
    size_t m = (size_t)(n > 0 ? n : 1);
    s.data = malloc(m * 5 * sizeof(double) + 4 * sizeof(double));
    s.layers = calloc(MOST_LAYERS, sizeof *s.layers);
    s.names = calloc(MOST_LAYERS, sizeof *s.names);
    if (!s.data || !s.layers || !s.names) {
        fputs("out of memory\n", stderr);
        exit(2);
    }
    double *step = s.data, *loss = step + m, *val = loss + m, *tps = val + m, *fp4 = tps + m, *plans = fp4 + m;
    int planned = share<0, every = n / 4> 0 ? n / 4 : 1;
    random_state = seed;
    for (int i = 0; i < n; i++) {
        double t = (double)i / (n > 1 ? n - 1 : 1), curve = 1.62 + 3.95 * exp(-t * 26) * (1 - t) + 1.55 * exp(-t * 2.6);
        step[i] = i + 1;
        loss[i] = curve + gap * t + 0.075 * normal();
        val[i] = i == n - 1 || (i + 1) % (n / 12 > 0 ? n / 12 : 1) == 0 ? curve + gap * t + 0.05 + 0.012 * normal()
                                                                        : -1;
        tps[i] = speed * (1 + 0.03 * normal()) * (uniform() < 0.01 ? 0.6 : 1);
        fp4[i] = planned ? (i < every ? 0 : i < 2 * every ? 0.752 : 0.757) : share;
    }
    plans[0] = every;
    plans[1] = 2 * every;
    plans[2] = 3 * every;
    for (int i = 0; i < blocks * 7; i++) {
        snip_layer_info *l = &s.layers[i];
        int block = i / 7, kind = i % 7;
        double depth = blocks > 1 ? (double)block / (blocks - 1) : 0,
               edge = 1 + 4 * exp(-8 * depth) + 2 * exp(-9 * (1 - depth));
        snprintf(s.names[i], sizeof s.names[i], "%d.%s", block, part[kind]);
        l->name = s.names[i];
        l->out_features = kind == 4 || kind == 5 ? 384 : 128;
        l->in_features = kind == 6 ? 384 : 128;
        l->stage = block * 2 / (blocks > 0 ? blocks : 1);
        for (int g = 0; g < 3; g++) {
            l->format[g] = share >= 1 ? SNIP_E2M1 : name[0] == 'f' ? SNIP_E4M3 : SNIP_BF16;
            if (!planned) continue;
            l->fp8.update[g] = 2e-6 * edge * fragile[kind] * exp(0.5 * normal()) * (g == 0 ? 3 : 1);
            l->fp4.update[g] = 160 * l->fp8.update[g] * exp(0.25 * normal());
        }
        if (!planned) continue;
        l->fp8.loss_second = 3e-6 * edge * fragile[kind] * exp(0.8 * normal());
        l->fp4.loss_second = 120 * l->fp8.loss_second;
        l->fp8.loss_first = 3e-6 * normal();
        l->fp4.loss_first = 1e-4 * normal();
        l->format[SNIP_FWD] = l->fp4.loss_first + l->fp4.loss_second < 3.5e-4 ? SNIP_E2M1 : SNIP_E4M3;
        l->format[SNIP_DGRAD] = l->fp4.update[1] < 4e-3 ? SNIP_E2M1 : SNIP_E4M3;
        l->format[SNIP_WGRAD] = l->fp4.update[2] < 3e-3 ? SNIP_E2M1 : SNIP_E4M3;
    }
    s.run = (report_run){ name, n, step, loss, val, tps, fp4, blocks * 7, s.layers, planned ? 3 : 0, plans };
    return s;
}

// ---- checks of the text --------------------------------------------------------------------------------------------
static char *slurp(FILE *f) {
    long n = ftell(f);
    char *text = malloc((size_t)(n > 0 ? n : 0) + 1);
    if (!text) exit(2);
    rewind(f);
    size_t got = fread(text, 1, (size_t)(n > 0 ? n : 0), f);
    text[got] = 0;
    fclose(f);
    return text;
}

static char *html(const char *title, const report_run *runs, int n, const report_fact *facts, int n_facts) {
    FILE *f = tmpfile();
    if (!f) {
        fputs("no temporary file\n", stderr);
        exit(2);
    }
    CHECK_THAT(report_write_html(f, title, runs, n, facts, n_facts) == 0, "report_write_html of %d runs returns 0", n);
    return slurp(f);
}

static char *svg(const report_run *run) {
    FILE *f = tmpfile();
    if (!f) {
        fputs("no temporary file\n", stderr);
        exit(2);
    }
    CHECK_THAT(report_write_plan_svg(f, run) == 0, "report_write_plan_svg returns 0");
    return slurp(f);
}

// NULL: balanced tags, quoted attributes that occur once a tag, only known entities, no stray control characters.
static const char *malformed(const char *s) {
    static char stack[64][24];
    int depth = 0;
    if (!strncmp(s, "<!DOCTYPE html>", 15)) s += 15;
    for (; *s; s++) {
        if ((unsigned char)*s < 32 && *s != '\n') return "control character";
        if (*s == '>') return "stray >";
        if (*s == '&') {
            size_t n = strcspn(s, ";");
            if (strncmp(s, "&amp;", 5) && strncmp(s, "&lt;", 4) && strncmp(s, "&gt;", 4) && strncmp(s, "&quot;", 6) &&
                strncmp(s, "&#39;", 5))
                return "bad entity";
            s += n;
            continue;
        }
        if (*s != '<') continue;
        int closing = *++s == '/';
        char tag[24], seen[16][24];
        size_t n = strspn(s += closing, "abcdefghijklmnopqrstuvwxyz0123456789");
        int attributes = 0;
        if (!n || n >= sizeof tag) return "bad tag name";
        memcpy(tag, s, n);
        tag[n] = 0;
        for (s += n; *s == ' '; attributes++) {
            n = strcspn(++s, "= <>\"");
            if (s[n] != '=' || s[n + 1] != '"' || !n || n >= 24) return "bad attribute";
            for (int i = 0; i < attributes; i++)
                if (strlen(seen[i]) == n && !memcmp(seen[i], s, n)) return "attribute twice";
            if (attributes == 16) return "too many attributes";
            memcpy(seen[attributes], s, n);
            seen[attributes][n] = 0;
            for (s += n + 2; *s && *s != '"'; s++)
                if (*s == '<') return "< in an attribute";
            if (*s++ != '"') return "open attribute";
        }
        if (closing) {
            if (!depth || strcmp(stack[--depth], tag)) return "wrong closing tag";
        } else if (*s == '/') {
            s++;
        } else {
            if (depth == 64) return "too deep";
            strcpy(stack[depth++], tag);
            if (!strcmp(tag, "style")) {
                const char *end = strstr(s, "</style>");
                if (!end) return "open style";
                s = end - 1;
                continue;
            }
        }
        if (*s != '>') return "open tag";
    }
    return depth ? "unclosed tag" : NULL;
}

static int valid_utf8(const char *s) {
    for (const unsigned char *p = (const unsigned char *)s; *p; p++) {
        int more = *p < 0x80                 ? 0
                   : *p >= 0xC2 && *p < 0xE0 ? 1
                   : *p >= 0xE0 && *p < 0xF0 ? 2
                   : *p >= 0xF0 && *p < 0xF5 ? 3
                                             : -1;
        if (more < 0) return 0;
        while (more--)
            if ((*++p & 0xC0) != 0x80) return 0;
    }
    return 1;
}

static int count(const char *text, const char *what) {
    int n = 0;
    for (const char *p = text; (p = strstr(p, what)) != NULL; p += strlen(what)) n++;
    return n;
}

static void sound(const char *text, const char *what)  // what every file must be
{
    static const char *const outside[] = { "src=",  "href=",  "url(",        "@import", "<script",
                                           "<link", "https:", "javascript:", "onload=" };
    const char *bad = malformed(text);
    int is_svg = !strncmp(text, "<svg", 4);
    CHECK_THAT(!bad, "%s: %s", what, bad ? bad : "");
    CHECK_THAT(valid_utf8(text), "%s: valid UTF-8", what);
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++)
        CHECK_THAT(!strstr(text, outside[i]), "%s: no %s", what, outside[i]);
    CHECK_THAT(count(text, "http:") == is_svg && count(text, "//") == is_svg, "%s: no address but the xmlns", what);
    CHECK_THAT(!strstr(text, "\"nan") && !strstr(text, "nan%") && !strstr(text, "nan,") && !strstr(text, ",nan") &&
                   !strstr(text, "-nan") && !strstr(text, "inf%") && !strstr(text, "\"inf") && !strstr(text, "inf,") &&
                   !strstr(text, ",inf"),
               "%s: no NaN or infinity in a coordinate", what);
    CHECK_THAT(strstr(text, "role=\"img\"") || !strstr(text, "<svg"), "%s: pictures have a role", what);
}

static void sound_both(const report_run *runs, int n, const char *what) {
    char *t = html(what, runs, n, NULL, 0);
    sound(t, what);
    free(t);
    for (int i = 0; i < n; i++) {
        t = svg(&runs[i]);
        sound(t, what);
        free(t);
    }
}

// ---- tests ---------------------------------------------------------------------------------------------------------
static void malformed_text_is_noticed(void)  // the checker must be able to fail
{
    CHECK_THAT(!malformed("<a><b x=\"1\"/>t &amp; u</a>"), "checker: accepts");
    CHECK_THAT(malformed("<a><b></a>") != NULL && malformed("<a>") != NULL && malformed("</a>") != NULL,
               "checker: unbalanced");
    CHECK_THAT(malformed("<a x=1/>") != NULL && malformed("<a x=\"1\" x=\"2\"/>") != NULL &&
                   malformed("<a x=\"<\"/>") != NULL,
               "checker: attributes");
    CHECK_THAT(malformed("a & b") != NULL && malformed("a > b") != NULL && malformed("\x01") != NULL, "checker: text");
    CHECK_THAT(!valid_utf8("\xC3") && !valid_utf8("\xFF") && valid_utf8("\xC3\xA9"), "checker: UTF-8");
}

static void a_report_shows_curves_and_plans(void) {
    sample s = sample_make("snip", 600, 4, 0, 6000, -1, 3), b = sample_make("bf16", 600, 4, 0, 5000, 0, 4);
    report_run runs[2] = { b.run, s.run };
    report_fact facts[1] = {
        {"blocks", "4"}
    };
    char *t = html("Run", runs, 2, facts, 1), *p;
    sound(t, "ordinary");
    CHECK_THAT(!strncmp(t, "<!DOCTYPE html>", 15) && strstr(t, "prefers-color-scheme:dark") &&
                   strstr(t, "name=\"viewport\""),
               "ordinary: HTML, dark mode, phone");
    CHECK_THAT(strstr(t, "Gap to bf16") && strstr(t, "<dt>blocks</dt><dd>4</dd>"), "ordinary: gap and facts");
    CHECK_THAT(count(t, "class=\"ln ") == 8, "ordinary: smoothed curves in four charts");
    CHECK_THAT(count(t, "class=\"sw ") >= 3, "ordinary: plan switches are marked");
    CHECK_THAT(strstr(t, "Loss divergence") && strstr(t, "Update divergence") && count(t, "0.attn.q in FP4:") == 2,
               "ordinary: both divergences");
    CHECK_THAT(strstr(t, "No layer was measured") != NULL, "ordinary: says that bf16 was not measured");
    free(t);
    t = svg(&s.run);
    sound(t, "plan");
    CHECK_THAT(strstr(t, "<title>Precision plan of snip") && strstr(t, "prefers-color-scheme:dark"),
               "plan: title, dark mode");
    CHECK_THAT(count(t, "<g><title>") == 28 &&
                   count(t, "<rect class=\"f") + count(t, "class=\"f4\"/>") + count(t, "class=\"f8\"/>") >= 84,
               "plan: 28 cells in three parts");
    CHECK_THAT(strstr(t, ">attn</text>") && strstr(t, ">mlp</text>") && strstr(t, ">gate</text>") &&
                   strstr(t, ">down</text>"),
               "plan: columns");
    for (int i = 0; i < 28; i++)
        for (int g = 0; g < 3; g++) s.layers[i].format[g] = i < 14 ? SNIP_E2M1 : SNIP_E4M3;
    p = svg(&s.run);
    CHECK_THAT(strstr(p, "FP4</tspan> 50.0%") && strstr(p, "FP8</tspan> 50.0%"), "plan: shares are by FLOPs");
    free(p);
    free(t);
    sample_free(&s);
    sample_free(&b);
}

static void names_are_escaped(void) {
    sample s = sample_make("<snip> & \"co\" 'x'", 20, 1, 0, 1, -1, 5);
    report_fact facts[4] = {
        {"a<b",                        "]]>&\x01\x1b[0m"                                                     },
        { NULL,                        NULL                                                                  },
        { "",                          ""                                                                    },
        { "latin1 \xE9, cut \xE2\x82", "\xED\xA0\x80 \xF8 \xC0\xAF \xEF\xBF\xBF \xF0\x9F\x8C\xBF ok \xC3\xA9"}
    };
    s.layers[0].name = "<b>.\"a\".&q";
    s.layers[1].name = "<b>.\"a\".\xFF"
                       "k";
    s.layers[2].name = NULL;
    char *t = html("</title><script>alert(1)</script>", &s.run, 1, facts, 4), *p = svg(&s.run);
    sound(t, "escapes");
    sound(p, "escapes, plan");
    CHECK_THAT(strstr(t, "&lt;/title&gt;&lt;script&gt;") &&
                   strstr(t, "&lt;snip&gt; &amp; &quot;co&quot; &#39;x&#39;") && strstr(t, "a&lt;b"),
               "escapes: XML");
    CHECK_THAT(count(t, "\xED\xA0") == 0 && count(t, "\xEF\xBF\xBF") == 0 &&
                   strstr(t, "\xF0\x9F\x8C\xBF ok \xC3\xA9") && strstr(t, "cut \xEF\xBF\xBD"),
               "escapes: UTF-8");
    free(t);
    free(p);
    sample_free(&s);
}

static void reports_of_any_length_are_sound(void) {
    static const int steps[] = { 0, 1, 2, 3, 5, 11, 12, 13, 999, 1000, 1001, 40000 },
                     blocks[] = { 0, 1, 2, 16, 17, 33, 65, 200 };
    char what[64];
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        sample s = sample_make("snip", steps[i], 1, 0, 5000, -1, 7);
        snprintf(what, sizeof what, "%d steps", steps[i]);
        sound_both(&s.run, 1, what);
        s.run.n_layers = 0;
        char *t = html(what, &s.run, 1, NULL, 0);
        CHECK_THAT(strlen(t) < 120000, "%s: curves are decimated (%ld bytes)", what, (long)strlen(t));
        CHECK_THAT(steps[i] == 0 || strstr(t, "class=\"ln "), "%s: a curve", what);
        free(t);
        sample_free(&s);
    }
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        sample s = sample_make("snip", 50, blocks[i], 0, 5000, -1, 8);
        snprintf(what, sizeof what, "%d blocks", blocks[i]);
        sound_both(&s.run, 1, what);
        char *t = svg(&s.run);
        CHECK_THAT(count(t, "<g><title>") == blocks[i] * 7, "%s: every layer", what);
        free(t);
        sample_free(&s);
    }
    char *t = html(NULL, NULL, 0, NULL, 0);
    sound(t, "nothing at all");
    free(t);
    report_run empty = { NULL, 4, NULL, NULL, NULL, NULL, NULL, 0, NULL, 2, NULL };
    sound_both(&empty, 1, "NULL arrays");
    empty.n_layers = 3;
    sound_both(&empty, 1, "NULL layers");
    sample s[8];
    report_run runs[8];
    for (int i = 0; i < 8; i++) {
        snprintf(what, sizeof what, "%d runs", i + 1);
        s[i] = sample_make(i == 3   ? "bf16"
                           : i == 5 ? "snip"
                                    : "other",
                           200 + 50 * i, i % 3, 0.02 * i, 4000 + 100 * i, i % 2 ? -1 : 0.5, (uint64_t)i + 20);
        runs[i] = s[i].run;
        sound_both(runs, i + 1, what);
    }
    for (int i = 0; i < 8; i++) sample_free(&s[i]);
}

static void odd_numbers_make_sound_reports(void) {
    double odd[] = { NOT_A_NUMBER, INFINITE, -INFINITE, -NOT_A_NUMBER, 0,     -0.0,   -3,      1e-320, 1e-30,
                     1e30,         -1e30,    1e76,      1e78,          1e300, -1e300, 1.7e308, 5e-324 };

    enum { ODD = sizeof odd / sizeof *odd };

    char what[64];
    CHECK_THAT(!report_ok(odd[0]) && !report_ok(odd[1]) && !report_ok(odd[2]) && !report_ok(odd[3]) &&
                   !report_ok(1e300),
               "numbers: refused");
    CHECK_THAT(report_ok(0) && report_ok(-5) && report_ok(1e30) && report_ok(5e-324), "numbers: accepted");
    for (int k = 0; k < ODD + 2; k++) {  // everywhere; here and there; all kinds mixed
        sample s = sample_make("snip", 300, 4, 0, 5000, -1, 9);
        snprintf(what, sizeof what, k < ODD ? "odd number %d" : "odd numbers mixed", k);
        for (int pass = 0; pass < 2; pass++) {
            for (int i = 0; i < 300 * 5; i++)
                if (k >= ODD ? uniform() < 0.5 : pass || i % 7 == 0)
                    s.data[i] = odd[k >= ODD ? (int)(uniform() * ODD) : k];
            for (int i = 0; i < 28; i++) {
                double v = odd[k >= ODD ? (int)(uniform() * ODD) : k];
                s.layers[i].fp4.loss_first = s.layers[i].fp8.update[i % 3] = v;
                if (pass) s.layers[i].fp8.loss_second = s.layers[i].fp4.update[0] = s.layers[i].fp4.update[1] = v;
            }
            sound_both(&s.run, 1, what);
        }
        sample_free(&s);
    }
    sample s = sample_make("fp4", 300, 0, 0, 5000, 1, 9), b = sample_make("bf16", 300, 0, 0, 5000, 0, 10);
    for (int i = 100; i < 300; i++) s.data[300 + i] = i < 200 ? exp(i * 0.2) : NOT_A_NUMBER;
    s.data[600 + 299] = NOT_A_NUMBER;
    report_run runs[2] = { s.run, b.run };
    char *t = html("Diverged", runs, 2, NULL, 0);
    sound(t, "diverged");
    CHECK_THAT(strstr(t, "Values beyond the upper edge are not drawn") != NULL, "diverged: says that the frame ends");
    CHECK_THAT(strstr(t, "fp4</th><td>\xE2\x80\x93</td><td>\xE2\x80\x93</td><td>\xE2\x80\x93</td>") != NULL,
               "diverged: a NaN at the end is no final loss");
    free(t);
    sample_free(&s);
    sample_free(&b);
}

static void odd_names_make_sound_reports(void) {
    static const char *const odd[] = {
        "",
        ".",
        "..",
        "...",
        "a",
        "a.",
        ".a",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "model.layers.12.self_attn.q_proj",
        "a.b.c",
        "a very long name of a layer that nobody would want to read.attn.but_it_may_occur_all_the_same",
        "\xE5\xB1\xA4\xE5\xB1\xA4\xE5\xB1\xA4\xE5\xB1\xA4\xE5\xB1\xA4\xE5\xB1\xA4\xE5\xB1\xA4.attn.q"
    };
    static const char *const gpt2[] = { "attn.qkv", "attn.proj", "mlp.fc", "mlp.proj" };
    sample s = sample_make("snip", 20, 10, 0, 1, -1, 11);
    int n = (int)(sizeof odd / sizeof *odd);
    for (int i = 0; i < n; i++) s.layers[i].name = odd[i];
    for (s.run.n_layers = 1; s.run.n_layers <= n; s.run.n_layers++) sound_both(&s.run, 1, "odd names");
    s.run.n_layers = 8;
    for (int i = 0; i < 8; i++)
        snprintf(s.names[i], sizeof s.names[i], "%d.%s", i / 4, gpt2[i % 4]), s.layers[i].name = s.names[i];
    report_grid g;
    CHECK_THAT(!report_grid_make(&g, &s.run) && g.rows == 2 && g.cols == 4,
               "names: attn.proj and mlp.proj are two columns");
    free(g.cell);
    s.run.n_layers = 70;
    for (int i = 0; i < 70; i++) snprintf(s.names[i], sizeof s.names[i], "linear%d", i), s.layers[i].name = s.names[i];
    CHECK_THAT(!report_grid_make(&g, &s.run) && g.rows == 70 && g.cols == 1, "names: without structure, one row each");
    free(g.cell);
    sound_both(&s.run, 1, "flat names");
    for (int i = 0; i < 70; i++) s.layers[i].name = "0.attn.q";
    CHECK_THAT(!report_grid_make(&g, &s.run) && g.rows == 70 && g.cols == 1,
               "names: one name many times, one row each");
    free(g.cell);
    for (int i = 0; i < 28; i++) s.layers[i].format[0] = (snip_format)(i % 12);
    sound_both(&s.run, 1, "any format");
    sample_free(&s);
}

static void write_errors_are_told(void) {
    sample s = sample_make("snip", 20, 1, 0, 1, -1, 12);
    FILE *f = fopen("/dev/full", "w");
    if (!f) {
        test_skip("no /dev/full here, write errors are not tested");
        sample_free(&s);
        return;
    }
    CHECK_THAT(report_write_html(f, "t", &s.run, 1, NULL, 0) != 0, "full disk: html");
    fclose(f);
    f = fopen("/dev/full", "w");
    CHECK_THAT(f && report_write_plan_svg(f, &s.run) != 0, "full disk: plan");
    if (f) fclose(f);
    sample_free(&s);
}

// ---- sample reports ------------------------------------------------------------------------------------------------
static void show(const char *dir, const char *name, const report_run *runs, int n, const report_run *plan) {
    static const report_fact facts[] = {
        {"Model",         "4 blocks, d = 128, 4 heads (2 kv), ffn 384"},
        { "Parameters",   "0.86 M (0.79 M in linear layers)"          },
        { "Data",         "tinyshakespeare.txt, 1,115,394 bytes"      },
        { "Batch",        "16 × 128 tokens"                          },
        { "Optimizer",    "AdamW, lr 3e-3, cosine, clip 1.0"          },
        { "Budget",       "75% of linear-layer FLOPs in FP4"          },
        { "Measurements", "every 150 steps, 2.9 steps’ time each"   },
        { "Last solve",   "0.21 ms"                                   },
        { "Seed",         "1"                                         },
        { "Threads",      "2"                                         }
    };
    char path[512];
    snprintf(path, sizeof path, "%s/%s.html", dir, name);
    FILE *f = fopen(path, "w");
    if (!f || report_write_html(f, "A small Llama under SNIP", runs, n, facts, 10)) {
        perror(path);
        exit(2);
    }
    fclose(f);
    snprintf(path, sizeof path, "%s/%s.svg", dir, name);
    f = fopen(path, "w");
    if (!f || report_write_plan_svg(f, plan)) {
        perror(path);
        exit(2);
    }
    fclose(f);
}

static void show_all(const char *dir) {
    sample s[4] = { sample_make("bf16", 600, 0, 0, 5210, 0, 31), sample_make("fp8", 600, 0, 0.003, 4890, 0, 31),
                    sample_make("fp4", 600, 4, 0.09, 4630, 1, 31), sample_make("snip", 600, 4, 0.012, 4705, -1, 31) };
    report_run runs[8] = { s[0].run, s[1].run, s[2].run, s[3].run };
    show(dir, "compare", runs, 4, &runs[3]);
    show(dir, "single", &runs[3], 1, &runs[3]);
    sample l = sample_make("snip", 20000, 32, 0, 105210, -1, 33);
    show(dir, "large", &l.run, 1, &l.run);
    sample h = sample_make("snip", 30, 200, 0, 105210, -1, 34);
    show(dir, "huge", &h.run, 1, &h.run);
    sample e[8];
    for (int i = 0; i < 8; i++) {
        static const char *const names[8] = {
            "bf16", "fp8", "fp4", "snip", "snip 50%", "snip 90%", "per layer", "mxfp4"
        };
        e[i] = sample_make(names[i], 400, 0, 0.03 * i, 5000 - 60 * i, i < 3 ? 0 : 0.1 * i, (uint64_t)i + 40);
        runs[i] = e[i].run;
    }
    for (int i = 150; i < 400; i++)
        e[7].data[400 + i] = e[7].data[800 + i] = i < 260 ? 2.4 + exp((i - 150) * 0.08) : NOT_A_NUMBER;
    show(dir, "eight", runs, 8, &runs[0]);
    sample o = sample_make("snip", 300, 6, 0, 9000, -1, 50);
    static const char *const hf[7] = { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                       "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj" };
    for (int i = 0; i < 42; i++) snprintf(o.names[i], sizeof o.names[i], "model.layers.%d.%s", i / 7, hf[i % 7]);
    o.layers[9].format[0] = SNIP_BF16;
    o.layers[10].format[1] = SNIP_F32;
    o.layers[11].fp4.loss_first = NOT_A_NUMBER;
    show(dir, "odd", &o.run, 1, &o.run);
    for (int i = 0; i < 4; i++) sample_free(&s[i]);
    for (int i = 0; i < 8; i++) sample_free(&e[i]);
    sample_free(&l);
    sample_free(&h);
    sample_free(&o);
}

int main(int argc, char **argv) {
    if (argc > 1) show_all(argv[1]);
    test_start(1, argv);
    RUN(malformed_text_is_noticed);
    RUN(a_report_shows_curves_and_plans);
    RUN(names_are_escaped);
    RUN(reports_of_any_length_are_sound);
    RUN(odd_numbers_make_sound_reports);
    RUN(odd_names_make_sound_reports);
    RUN(write_errors_are_told);
    return test_end();
}
