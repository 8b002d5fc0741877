// test.h - what the tests in C share: counted checks, the closing line, memory that is freed after each test, random
// numbers and temporary files. Included first in a test, once.
//
//     static void sums_are_exact(void) {
//         test_about("%d rows", rows);           // said with the checks that fail from here on
//         CHECK(sum == 3);
//     }
//
//     int main(int argc, char **argv) {
//         test_start(argc, argv);                // arguments: parts of the names of the tests to run; none: all
//         RUN(sums_are_exact);
//         return test_end();                     // prints "N passed, N failed, N skipped"
//     }
//
// SNIP_TEST_FEW=n in the environment: one case in n where a test draws many, for emulators and sanitizers.
#ifndef SNIP_TEST_H
#define SNIP_TEST_H

#if !defined(_POSIX_C_SOURCE) && !defined(_DEFAULT_SOURCE) && !defined(_GNU_SOURCE)
#    define _POSIX_C_SOURCE 200809L  // mkdtemp
#endif
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef _OPENMP
#    include <omp.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#    define TEST_UNUSED __attribute__((unused))
#    define TEST_PRINTS(text, first) __attribute__((unused, format(printf, text, first)))
#else
#    define TEST_UNUSED
#    define TEST_PRINTS(text, first)
#endif

enum {
    TEST_MOST_PRINTED = 40,  // failures: the rest are counted alone
    TEST_MOST_PATHS = 16,
    TEST_PATH_LENGTH = 256
};

static struct {
    long passed, failed, skipped;
    int few;           // one case in so many
    const char *name;  // of the test that runs
    char about[256];   // the case that it is at
    int n_wanted;      // parts of names, from the command line
    char **wanted;
    void (*after)(void);  // called after each test, before its memory is freed
    void **rooms;
    size_t n_rooms;
    char folder[TEST_PATH_LENGTH];
    char paths[TEST_MOST_PATHS][TEST_PATH_LENGTH];
    int n_paths;
} test;

// ---- checks ----

TEST_PRINTS(1, 2) static void test_about(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(test.about, sizeof test.about, format, arguments);
    va_end(arguments);
}

TEST_UNUSED static int test_check(int ok, const char *condition, const char *file, int line) {
    if (ok) {
        test.passed++;
        return 1;
    }
    const char *slash = strrchr(file, '/');
    if (test.failed++ < TEST_MOST_PRINTED)
        printf("FAILED: %s, %s:%d: %s   [%s]\n", test.name ? test.name : "main", slash ? slash + 1 : file, line,
               condition, test.about);
    return 0;
}

// Counts the condition and goes on; its value. CHECK_THAT says first, as printf does, what it is about.
#define CHECK(condition) test_check((condition) != 0, #condition, __FILE__, __LINE__)
#define CHECK_THAT(condition, ...) (test_about(__VA_ARGS__), CHECK(condition))

TEST_PRINTS(1, 2) static void test_skip(const char *format, ...) {
    va_list arguments;
    test.skipped++;
    printf("skipped: ");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
}

// ---- memory ----

// Zeroed memory without a byte to spare, so that a sanitizer sees an overrun; freed after the test.
TEST_UNUSED static void *room(size_t size) {
    void *memory = calloc(size ? size : 1, 1);
    void **rooms = (void **)realloc(test.rooms, (test.n_rooms + 1) * sizeof *rooms);
    if (!memory || !rooms) {
        printf("out of memory\n");
        exit(2);
    }
    test.rooms = rooms;
    test.rooms[test.n_rooms++] = memory;
    return memory;
}

TEST_UNUSED static void test_free_rooms(void) {
    for (size_t i = 0; i < test.n_rooms; i++) free(test.rooms[i]);
    free(test.rooms);
    test.rooms = NULL;
    test.n_rooms = 0;
}

// ---- temporary files ----

// The path of a file of this name in a folder of this process's own, removed at the end.
TEST_UNUSED static const char *test_path(const char *name) {
    if (!test.folder[0]) {
        const char *parent = getenv("TMPDIR");
        snprintf(test.folder, sizeof test.folder, "%s/snip_test_XXXXXX", parent && *parent ? parent : "/tmp");
        if (!mkdtemp(test.folder)) {
            perror(test.folder);
            exit(2);
        }
    }
    char path[TEST_PATH_LENGTH];
    int length = snprintf(path, sizeof path, "%s/%s", test.folder, name);
    for (int i = 0; i < test.n_paths; i++)
        if (!strcmp(test.paths[i], path)) return test.paths[i];
    if (test.n_paths == TEST_MOST_PATHS || length < 0 || length >= (int)sizeof path) {
        printf("too many temporary files, or too long a name\n");
        exit(2);
    }
    memcpy(test.paths[test.n_paths], path, sizeof path);
    return test.paths[test.n_paths++];
}

TEST_UNUSED static char *test_read(const char *path, size_t *size) {  // a zero follows the last byte
    size_t most = 1 << 16;
    char *text = (char *)room(most + 1);
    FILE *file = fopen(path, "rb");
    *size = file ? fread(text, 1, most, file) : 0;
    if (file) fclose(file);
    return text;
}

TEST_UNUSED static void test_write(const char *path, const void *data, size_t size) {
    remove(path);  // a file that is cut and written again is waited for by some file systems
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(data, 1, size, file) == size);
    if (file) CHECK(fclose(file) == 0);
}

// ---- random numbers, digests, threads ----

static uint64_t random_state = 1;

TEST_UNUSED static uint64_t random_bits(void) {  // splitmix64
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

#define TEST_HASH_START 0xCBF29CE484222325u

TEST_UNUSED static uint64_t test_hash(uint64_t hash, const void *data, size_t size) {  // FNV-1a
    const unsigned char *bytes = (const unsigned char *)data;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001B3u;
    return hash;
}

TEST_UNUSED static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// ---- running ----

TEST_UNUSED static void test_start(int argc, char **argv) {
    const char *few = getenv("SNIP_TEST_FEW");
    test.few = few && atoi(few) > 1 ? atoi(few) : 1;
    test.n_wanted = argc - 1;
    test.wanted = argv + 1;
    set_threads(1);
}

TEST_UNUSED static void test_run(const char *name, void (*function)(void)) {
    int wanted = test.n_wanted == 0;
    for (int i = 0; i < test.n_wanted; i++) wanted = wanted || strstr(name, test.wanted[i]) != NULL;
    if (!wanted) return;
    test.name = name;
    test.about[0] = 0;
    random_state = 1;
    function();
    if (test.after) test.after();
    test_free_rooms();
    test.name = NULL;
}

// Runs a function without arguments as a test, where the command line wants it.
#define RUN(function) test_run(#function, function)

// The closing line; what main returns.
TEST_UNUSED static int test_end(void) {
    for (int i = 0; i < test.n_paths; i++) remove(test.paths[i]);
    if (test.folder[0]) rmdir(test.folder);
    test_free_rooms();
    printf("%ld passed, %ld failed, %ld skipped\n", test.passed, test.failed, test.skipped);
    return test.failed != 0 || test.passed == 0;
}

#endif
