/* Loaded before the C library: from the n-th operation on files under a folder on, each fails, as on a full disk or a bad one.
 * The test sets `limit_writes` or `limit_reads` in a forked child; the counts tell how many operations there are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

long limit_writes = -1, limit_reads = -1, count_writes = 0, count_reads = 0;
char folder[4096] = "";

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int inside(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int holds(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return inside(path);
}

static int fails(long *count, long limit, int error) {
    if (limit < 0 || ++*count < limit) return 0;
    errno = error;
    return 1;
}

#define WRITES(yes) ((yes) && fails(&count_writes, limit_writes, ENOSPC))
#define READS(yes) ((yes) && fails(&count_reads, limit_reads, EIO))

ssize_t write(int fd, const void *data, size_t size) { return WRITES(holds(fd)) ? -1 : REAL(write)(fd, data, size); }
ssize_t writev(int fd, const struct iovec *parts, int n) { return WRITES(holds(fd)) ? -1 : REAL(writev)(fd, parts, n); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return WRITES(holds(fd)) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
int fsync(int fd) { return WRITES(holds(fd)) ? -1 : REAL(fsync)(fd); }
int ftruncate64(int fd, off64_t size) { return WRITES(holds(fd)) ? -1 : REAL(ftruncate64)(fd, size); }
int mkdir(const char *path, mode_t mode) { return WRITES(inside(path)) ? -1 : REAL(mkdir)(path, mode); }
ssize_t read(int fd, void *data, size_t size) { return READS(holds(fd)) ? -1 : REAL(read)(fd, data, size); }

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return WRITES((flags & O_CREAT) && inside(path)) ? -1 : REAL(open64)(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return WRITES((flags & O_CREAT) && inside(path)) ? -1 : REAL(open)(path, flags, mode);
}
