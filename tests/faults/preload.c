/* Make calls on the files of one directory go wrong, as a table in a shared file says.

   Loaded with LD_PRELOAD into the process under test; RESPKV_FAULTS names the shared file, which
   preload.py lays out and changes while the process runs. What libc does not do, io_uring above all,
   is not seen here; but io_uring_setup can be refused, which sends a program to its threads.  */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* These orders are those of CALLS and KINDS in preload.py. */
enum call { READ, WRITE, SYNC, OPEN, RENAME, TRUNCATE, ALLOCATE, REMOVE, IO_URING };
enum kind { ERROR, SHORT, TORN, DROPPED, MISDIRECTED, FLIP, SLOW, HANG };

enum { RULES = 16, NAME_BYTES = 64, DIRECTORY_BYTES = 1024, PLACE_BYTES = 4096 };

struct rule {
    uint32_t is_active, kind, calls;
    int32_t code;
    uint32_t skip, every, times, delay_us; /* times: 0 for no end */
    uint32_t seen, hits;
    char name[NAME_BYTES];
};

struct table {
    char directory[DIRECTORY_BYTES];
    struct rule rules[RULES];
};

static struct table *table;

__attribute__((constructor)) static void map_table(void)
{
    const char *path = getenv("RESPKV_FAULTS");
    int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1;
    if (fd < 0)
        return;
    void *memory = mmap(NULL, sizeof *table, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory != MAP_FAILED)
        table = memory;
}

/* The function of libc that one of ours stands in front of. */
#define REAL(name)                                  \
    (*({                                            \
        static __typeof__(&name) real_;             \
        if (!real_)                                 \
            real_ = dlsym(RTLD_NEXT, #name);        \
        real_;                                      \
    }))

/* Which rule hits this call? */

static int is_active(const struct rule *rule, enum call call)
{
    return __atomic_load_n(&rule->is_active, __ATOMIC_ACQUIRE) && rule->calls >> call & 1;
}

static int is_interesting(enum call call)
{
    for (int i = 0; table && i < RULES; i++)
        if (is_active(&table->rules[i], call))
            return 1;
    return 0;
}

static int is_chosen(struct rule *rule)
{
    uint32_t seen = __atomic_fetch_add(&rule->seen, 1, __ATOMIC_SEQ_CST);
    if (seen < rule->skip || (seen - rule->skip) % rule->every)
        return 0;
    uint32_t hits = __atomic_fetch_add(&rule->hits, 1, __ATOMIC_SEQ_CST);
    if (rule->times && hits >= rule->times) {
        __atomic_fetch_sub(&rule->hits, 1, __ATOMIC_SEQ_CST);
        return 0;
    }
    return 1;
}

/* Take the time of the rules that hit a call on this path, and return the first other one. */
static struct rule *hit_path(enum call call, const char *path)
{
    size_t length = strlen(table->directory);
    if (strncmp(path, table->directory, length) || (path[length] && path[length] != '/'))
        return NULL;
    const char *name = path[length] ? path + length + 1 : "";
    struct rule *hit = NULL;
    for (struct rule *rule = table->rules; rule < table->rules + RULES; rule++) {
        if (!is_active(rule, call) || strncmp(name, rule->name, strlen(rule->name)))
            continue;
        if (!is_chosen(rule))
            continue;
        if (rule->kind == SLOW)
            nanosleep(&(struct timespec){rule->delay_us / 1000000,
                                         rule->delay_us % 1000000 * 1000L}, NULL);
        else if (rule->kind == HANG)
            while (is_active(rule, call))
                nanosleep(&(struct timespec){0, 1000000}, NULL);
        else if (!hit)
            hit = rule;
    }
    return hit;
}

static struct rule *hit_fd(enum call call, int fd)
{
    char link[64], path[PATH_MAX];
    int saved = errno;
    if (!is_interesting(call))
        return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length < 0)
        return NULL;
    path[length] = 0;
    return hit_path(call, path);
}

static struct rule *hit_at(enum call call, int folder, const char *name)
{
    char link[64], path[2 * PATH_MAX];
    ssize_t length = 0;
    int saved = errno;
    if (!is_interesting(call))
        return NULL;
    if (name[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d",
                 folder);
        length = readlink(link, path, PATH_MAX - 1);
        errno = saved;
        if (length < 0)
            return NULL;
        path[length++] = '/';
    }
    snprintf(path + length, sizeof path - (size_t)length, "%s", name);
    return hit_path(call, path);
}

static int fail(const struct rule *rule)
{
    errno = rule->code;
    return -1;
}

/* Reads and writes: all of them are preadv2 and pwritev2; offset -1 is the file's own position. */

static size_t size_of(const struct iovec *pieces, int count)
{
    size_t total = 0;
    for (int i = 0; i < count; i++)
        total += pieces[i].iov_len;
    return total;
}

static ssize_t move(enum call call, int fd, const struct iovec *pieces, int count, off_t at)
{
    return call == WRITE ? REAL(pwritev2)(fd, pieces, count, at, 0)
                         : REAL(preadv2)(fd, pieces, count, at, 0);
}

static ssize_t move_part(enum call call, int fd, const struct iovec *pieces, int count, off_t at,
                         size_t nbytes)
{
    struct iovec part[count];
    int used = 0;
    for (; used < count && nbytes; used++) {
        part[used] = pieces[used];
        if (part[used].iov_len > nbytes)
            part[used].iov_len = nbytes;
        nbytes -= part[used].iov_len;
    }
    return used ? move(call, fd, part, used, at) : 0;
}

/* About half of a size, such that the rest may be moved by itself. */
static size_t half_of(int fd, size_t nbytes)
{
    size_t unit = fcntl(fd, F_GETFL) & O_DIRECT ? PLACE_BYTES : nbytes < 1024 ? 1 : 512;
    return nbytes / 2 / unit * unit;
}

static void flip_bit(const struct iovec *pieces, size_t nbytes, uint32_t hits)
{
    uint64_t bit = hits * 0x9e3779b97f4a7c15u % (nbytes * 8);
    for (; bit / 8 >= pieces->iov_len; pieces++)
        bit -= pieces->iov_len * 8;
    ((uint8_t *)pieces->iov_base)[bit / 8] ^= (uint8_t)(1 << bit % 8);
}

static ssize_t flipped(enum call call, int fd, const struct iovec *pieces, int count, off_t at,
                       const struct rule *rule)
{
    size_t total = size_of(pieces, count), filled = 0;
    struct iovec copy = {NULL, total};
    if (call == READ) {
        ssize_t done = move(call, fd, pieces, count, at);
        if (done > 0)
            flip_bit(pieces, (size_t)done, rule->hits);
        return done;
    }
    if (posix_memalign(&copy.iov_base, PLACE_BYTES, total))
        abort();
    for (int i = 0; i < count; filled += pieces[i++].iov_len)
        memcpy((char *)copy.iov_base + filled, pieces[i].iov_base, pieces[i].iov_len);
    flip_bit(&copy, total, rule->hits);
    ssize_t done = move(call, fd, &copy, 1, at);
    free(copy.iov_base);
    return done;
}

static ssize_t misdirected(enum call call, int fd, const struct iovec *pieces, int count, off_t at,
                           const struct rule *rule)
{
    off_t total = (off_t)size_of(pieces, count);
    off_t from = at < 0 ? lseek(fd, 0, SEEK_CUR) : at;
    struct stat file;
    if (fstat(fd, &file) == 0 && file.st_size > total) {
        off_t places = (file.st_size - total) / PLACE_BYTES + 1;
        off_t place = (off_t)(rule->hits * 2654435761u % (uint64_t)places) * PLACE_BYTES;
        if (place == from)
            place = (place + PLACE_BYTES) % (places * PLACE_BYTES);
        if (place != from && move(call, fd, pieces, count, place) < 0)
            return -1;
    }
    if (at < 0)
        lseek(fd, total, SEEK_CUR);
    return total;
}

static ssize_t move_wrong(enum call call, int fd, const struct iovec *pieces, int count, off_t at,
                          const struct rule *rule)
{
    size_t total = size_of(pieces, count), half = half_of(fd, total);
    if (rule->kind == ERROR)
        return fail(rule);
    if (!total)
        return 0;
    switch (rule->kind) {
    case SHORT:
        return half ? move_part(call, fd, pieces, count, at, half)
                    : move(call, fd, pieces, count, at);
    case FLIP:
        return flipped(call, fd, pieces, count, at, rule);
    case MISDIRECTED:
        return misdirected(call, fd, pieces, count, at, rule);
    }
    /* TORN or DROPPED: all of it is reported to be moved. */
    ssize_t done = rule->kind == TORN ? move_part(call, fd, pieces, count, at, half) : 0;
    if (done < 0)
        return -1;
    if (at < 0)
        lseek(fd, (off_t)total - done, SEEK_CUR);
    return (ssize_t)total;
}

#define MOVES(call, pieces, count, at, otherwise)                                    \
    do {                                                                             \
        struct rule *rule_ = hit_fd(call, fd);                                       \
        return rule_ ? move_wrong(call, fd, pieces, count, at, rule_) : (otherwise); \
    } while (0)

#define PIECE(data, nbytes) (&(struct iovec){(void *)(data), nbytes})

ssize_t read(int fd, void *into, size_t n)
{
    MOVES(READ, PIECE(into, n), 1, -1, REAL(read)(fd, into, n));
}

ssize_t write(int fd, const void *data, size_t n)
{
    MOVES(WRITE, PIECE(data, n), 1, -1, REAL(write)(fd, data, n));
}

ssize_t pread(int fd, void *into, size_t n, off_t at)
{
    MOVES(READ, PIECE(into, n), 1, at, REAL(pread)(fd, into, n, at));
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at)
{
    MOVES(WRITE, PIECE(data, n), 1, at, REAL(pwrite)(fd, data, n, at));
}

ssize_t readv(int fd, const struct iovec *pieces, int n)
{
    MOVES(READ, pieces, n, -1, REAL(readv)(fd, pieces, n));
}

ssize_t writev(int fd, const struct iovec *pieces, int n)
{
    MOVES(WRITE, pieces, n, -1, REAL(writev)(fd, pieces, n));
}

ssize_t preadv(int fd, const struct iovec *pieces, int n, off_t at)
{
    MOVES(READ, pieces, n, at, REAL(preadv)(fd, pieces, n, at));
}

ssize_t pwritev(int fd, const struct iovec *pieces, int n, off_t at)
{
    MOVES(WRITE, pieces, n, at, REAL(pwritev)(fd, pieces, n, at));
}

ssize_t preadv2(int fd, const struct iovec *pieces, int n, off_t at, int flags)
{
    MOVES(READ, pieces, n, at, REAL(preadv2)(fd, pieces, n, at, flags));
}

ssize_t pwritev2(int fd, const struct iovec *pieces, int n, off_t at, int flags)
{
    MOVES(WRITE, pieces, n, at, REAL(pwritev2)(fd, pieces, n, at, flags));
}

#define ALIAS(result, name, ...) result name##64(__VA_ARGS__) __attribute__((alias(#name)))
ALIAS(ssize_t, pread, int, void *, size_t, off_t);
ALIAS(ssize_t, pwrite, int, const void *, size_t, off_t);
ALIAS(ssize_t, preadv, int, const struct iovec *, int, off_t);
ALIAS(ssize_t, pwritev, int, const struct iovec *, int, off_t);
ssize_t preadv64v2(int, const struct iovec *, int, off_t, int) __attribute__((alias("preadv2")));
ssize_t pwritev64v2(int, const struct iovec *, int, off_t, int) __attribute__((alias("pwritev2")));

/* The others fail, or are said to have been done. */

#define ENDS(call, otherwise)                                            \
    do {                                                                 \
        struct rule *rule_ = hit_fd(call, fd);                           \
        return !rule_ ? (otherwise) : rule_->kind == ERROR ? fail(rule_) : 0; \
    } while (0)

int fsync(int fd)
{
    ENDS(SYNC, REAL(fsync)(fd));
}

int fdatasync(int fd)
{
    ENDS(SYNC, REAL(fdatasync)(fd));
}

int ftruncate(int fd, off_t nbytes)
{
    ENDS(TRUNCATE, REAL(ftruncate)(fd, nbytes));
}
ALIAS(int, ftruncate, int, off_t);

int fallocate(int fd, int mode, off_t at, off_t nbytes)
{
    ENDS(ALLOCATE, REAL(fallocate)(fd, mode, at, nbytes));
}
ALIAS(int, fallocate, int, int, off_t, off_t);

int posix_fallocate(int fd, off_t at, off_t nbytes) /* returns the error */
{
    struct rule *rule = hit_fd(ALLOCATE, fd);
    return rule ? rule->kind == ERROR ? rule->code : 0 : REAL(posix_fallocate)(fd, at, nbytes);
}
ALIAS(int, posix_fallocate, int, off_t, off_t);

int openat(int folder, const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    struct rule *rule = hit_at(OPEN, folder, path);
    return rule ? fail(rule) : REAL(openat)(folder, path, flags, mode);
}
ALIAS(int, openat, int, const char *, int, ...);

int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    struct rule *rule = hit_at(OPEN, AT_FDCWD, path);
    return rule ? fail(rule) : REAL(open)(path, flags, mode);
}
ALIAS(int, open, const char *, int, ...);

int rename(const char *from, const char *to)
{
    struct rule *rule = hit_at(RENAME, AT_FDCWD, to);
    return rule ? fail(rule) : REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to)
{
    struct rule *rule = hit_at(RENAME, to_folder, to);
    return rule ? fail(rule) : REAL(renameat)(from_folder, from, to_folder, to);
}

int unlink(const char *path)
{
    struct rule *rule = hit_at(REMOVE, AT_FDCWD, path);
    return rule ? fail(rule) : REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags)
{
    struct rule *rule = hit_at(REMOVE, folder, path);
    return rule ? fail(rule) : REAL(unlinkat)(folder, path, flags);
}

long syscall(long number, ...)
{
    long args[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++)
        args[i] = va_arg(rest, long);
    va_end(rest);
    struct rule *rule =
        number == SYS_io_uring_setup && is_interesting(IO_URING)
            ? hit_path(IO_URING, table->directory)
            : NULL;
    return rule ? fail(rule)
                : REAL(syscall)(number, args[0], args[1], args[2], args[3], args[4], args[5]);
}
