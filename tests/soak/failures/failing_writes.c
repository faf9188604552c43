/* LD_PRELOAD: the k-th call that changes the file system below a folder fails, whichever library
   makes it.

   All processes that load this share one control file ($VENEER_FAULTS), mapped; so a harness arms
   it from outside, and a command and the processes that it starts are counted together. Calls go to
   the kernel by syscall(): nothing of libc is needed to find them. Linux alone. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    ONCE = 0,
    FROM_THEN_ON = 1,
    FULL = 2
}; /* FULL: from then on whatever needs room; what frees it works */
enum { NEEDS_ROOM = 1, FREES_ROOM = 2, NEITHER = 3 };

struct control {
    long count;  /* calls so far */
    long k;      /* which one fails, from 1; 0: none */
    long number; /* errno */
    long mode;
    long failed; /* calls that have failed */
    char under[PATH_MAX];
    char call[64]; /* the first one that failed */
    char path[PATH_MAX];
};

static struct control *control;

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("VENEER_FAULTS");
    if (!file) return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *found = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (found != MAP_FAILED) control = found;
}

static int below(const char *path) {
    size_t n = strlen(control->under);
    return n && !strncmp(path, control->under, n) && (path[n] == '/' || path[n] == 0);
}

static int fails(const char *call, const char *path, int kind) {
    if (!control || !control->k || !below(path)) return 0;
    long count = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (count < control->k || (count > control->k && control->mode == ONCE)) return 0;
    if (count > control->k && control->mode == FULL && kind != NEEDS_ROOM) return 0;
    if (__atomic_fetch_add(&control->failed, 1, __ATOMIC_SEQ_CST) == 0) {
        strncpy(control->call, call, sizeof control->call - 1);
        strncpy(control->path, path, sizeof control->path - 1);
    }
    errno = (int)control->number;
    return 1;
}

static int fails_at(const char *call, int folder, const char *path, int kind) {
    if (!control || !control->k || !path) return 0;
    char whole[2 * PATH_MAX], link[64];
    if (path[0] == '/') return fails(call, path, kind);
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, whole, PATH_MAX) < 0) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = syscall(SYS_readlink, link, whole, PATH_MAX - 1);
        if (n < 0) return 0;
        whole[n] = 0;
    }
    strncat(whole, "/", sizeof whole - strlen(whole) - 1);
    strncat(whole, path, sizeof whole - strlen(whole) - 1);
    return fails(call, whole, kind);
}

static int fails_on(const char *call, int fd, int kind) {
    if (!control || !control->k) return 0;
    char link[64], whole[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlink, link, whole, sizeof whole - 1);
    if (n < 0) return 0;
    whole[n] = 0;
    return fails(call, whole, kind);
}

static int writes(int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) != 0; }

#define MODE(flags)                                                                                \
    mode_t mode = 0;                                                                               \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                                         \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode = va_arg(rest, mode_t);                                                               \
        va_end(rest);                                                                              \
    }

#define OPENAT(name)                                                                               \
    int name(int folder, const char *path, int flags, ...) {                                       \
        MODE(flags)                                                                                \
        if (writes(flags) && fails_at("open", folder, path, NEEDS_ROOM)) return -1;                \
        return (int)syscall(SYS_openat, folder, path, flags, mode);                                \
    }
#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        MODE(flags)                                                                                \
        if (writes(flags) && fails_at("open", AT_FDCWD, path, NEEDS_ROOM)) return -1;              \
        return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);                              \
    }
OPENAT(openat)
OPENAT(openat64)
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void *bytes, size_t count) {
    if (fails_on("write", fd, NEEDS_ROOM)) {
        if (control->mode != FULL || count < 2 || control->failed > 1) return -1;
        count /= 2; /* a disk that fills up takes what still fits; the rest is refused */
    }
    return syscall(SYS_write, fd, bytes, count);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return fails_on("writev", fd, NEEDS_ROOM) ? -1 : syscall(SYS_writev, fd, parts, count);
}
#define PWRITE(name)                                                                               \
    ssize_t name(int fd, const void *bytes, size_t count, off_t at) {                              \
        return fails_on("pwrite", fd, NEEDS_ROOM) ? -1                                             \
                                                  : syscall(SYS_pwrite64, fd, bytes, count, at);   \
    }
PWRITE(pwrite)
PWRITE(pwrite64)
#define SENDFILE(name)                                                                             \
    ssize_t name(int out, int in, off_t *at, size_t count) {                                       \
        return fails_on("sendfile", out, NEEDS_ROOM) ? -1                                          \
                                                     : syscall(SYS_sendfile, out, in, at, count);  \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)
ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t count, unsigned flags) {
    return fails_on("copy_file_range", out, NEEDS_ROOM)
               ? -1
               : syscall(SYS_copy_file_range, in, from, out, to, count, flags);
}
#define TRUNCATE(name)                                                                             \
    int name(int fd, off_t size) {                                                                 \
        return fails_on("ftruncate", fd, NEEDS_ROOM) ? -1 : (int)syscall(SYS_ftruncate, fd, size); \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)
int fsync(int fd) { return fails_on("fsync", fd, NEEDS_ROOM) ? -1 : (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) {
    return fails_on("fdatasync", fd, NEEDS_ROOM) ? -1 : (int)syscall(SYS_fdatasync, fd);
}
int fchmod(int fd, mode_t mode) {
    return fails_on("fchmod", fd, NEITHER) ? -1 : (int)syscall(SYS_fchmod, fd, mode);
}
int close(int fd) { /* NFS tells of a full disk or a used-up quota here; the file is closed all the
                       same */
    int flags = control && control->k ? (int)syscall(SYS_fcntl, fd, F_GETFL) : 0;
    int failed = flags > 0 && (flags & (O_WRONLY | O_RDWR)) && fails_on("close", fd, NEEDS_ROOM);
    int number = errno, done = (int)syscall(SYS_close, fd);
    if (!failed) return done;
    errno = number;
    return -1;
}

int renameat(int from, const char *old, int to, const char *new) {
    if (fails_at("rename", to, new, NEEDS_ROOM)) return -1;
    return (int)syscall(SYS_renameat2, from, old, to, new, 0);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    if (fails_at("rename", to, new, NEEDS_ROOM)) return -1;
    return (int)syscall(SYS_renameat2, from, old, to, new, flags);
}
int rename(const char *old, const char *new) { return renameat(AT_FDCWD, old, AT_FDCWD, new); }
int mkdirat(int folder, const char *path, mode_t mode) {
    return fails_at("mkdir", folder, path, NEEDS_ROOM)
               ? -1
               : (int)syscall(SYS_mkdirat, folder, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int folder, const char *path, int flags) {
    return fails_at("unlink", folder, path, FREES_ROOM)
               ? -1
               : (int)syscall(SYS_unlinkat, folder, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int linkat(int from, const char *old, int to, const char *new, int flags) {
    if (fails_at("link", to, new, NEEDS_ROOM)) return -1;
    return (int)syscall(SYS_linkat, from, old, to, new, flags);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int symlinkat(const char *target, int folder, const char *path) {
    return fails_at("symlink", folder, path, NEEDS_ROOM)
               ? -1
               : (int)syscall(SYS_symlinkat, target, folder, path);
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    (void)flags; /* the kernel's call has none */
    return fails_at("chmod", folder, path, NEITHER)
               ? -1
               : (int)syscall(SYS_fchmodat, folder, path, mode);
}
int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
