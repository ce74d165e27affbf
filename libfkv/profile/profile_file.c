/* SPDX-License-Identifier: Apache-2.0 */
/* Profiles in files: read whole or not at all, replaced whole or not at all. */
#define _GNU_SOURCE
#include "profile/profile.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static fkv_status fail_io(struct fkv_ctx *ctx, const char *path, const char *what, int error) {
    char buffer[128];
    return fkv_fail(ctx, FKV_ERR_IO, "%s: %s: %s", path, what,
                    strerror_r(error, buffer, sizeof buffer));
}

/* The size of a file that is fit to be read. */
static fkv_status check_file(struct fkv_ctx *ctx, const char *path, int fd, size_t *size) {
    struct stat st;
    if (fstat(fd, &st) != 0) {
        return fail_io(ctx, path, "fstat", errno);
    }
    if (!S_ISREG(st.st_mode)) {
        return fkv_fail(ctx, FKV_ERR_IO, "%s: not a regular file", path);
    }
    if ((uint64_t)st.st_size > ctx->max_file_bytes) {
        return fkv_fail(ctx, FKV_ERR_LIMIT, "%s: %" PRId64 " bytes, max_file_bytes is %" PRIu64,
                        path, (int64_t)st.st_size, ctx->max_file_bytes);
    }
    *size = (size_t)st.st_size;
    return FKV_OK;
}

/* Up to `size` bytes; *got is less if the file has become shorter. */
static fkv_status read_all(struct fkv_ctx *ctx, const char *path, int fd, char *buffer, size_t size,
                           size_t *got) {
    *got = 0;
    while (*got < size) {
        ssize_t n = read(fd, buffer + *got, size - *got);
        if (n < 0 && errno != EINTR) {
            return fail_io(ctx, path, "read", errno);
        }
        if (n == 0) {
            break;
        }
        *got += n > 0 ? (size_t)n : 0;
    }
    return FKV_OK;
}

fkv_status fkv_profile_from_file(struct fkv_ctx *ctx, const char *path,
                                 struct fkv_profile_object **out) {
    /* non-blocking: opening a pipe must not wait for a writer */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0) {
        return fail_io(ctx, path, "open", errno);
    }
    size_t size = 0, got;
    fkv_status status = check_file(ctx, path, fd, &size);
    if (status == FKV_OK) {
        char *text = fkv_heap_alloc(&ctx->heap, size + 1);
        if (!text) {
            status = fkv_fail_memory(ctx, size + 1, path);
        } else {
            status = read_all(ctx, path, fd, text, size, &got);
            if (status == FKV_OK) {
                status = fkv_profile_from_json(ctx, text, got, out);
            }
            fkv_heap_free(&ctx->heap, text, size + 1);
        }
    }
    close(fd);
    return status;
}

static int write_all(int fd, const char *text, size_t bytes) {
    while (bytes > 0) {
        ssize_t n = write(fd, text, bytes);
        if (n < 0 && errno != EINTR) {
            return errno;
        }
        if (n > 0) {
            text += n;
            bytes -= (size_t)n;
        }
    }
    return fsync(fd) == 0 ? 0 : errno;
}

/* A new file beside `path`, its name in `temporary`; -1 with errno. */
static int open_beside(const char *path, char *temporary, size_t room) {
    const char *slash = strrchr(path, '/');
    int directory = slash ? (int)(slash - path) + 1 : 0;
    int fd = -1;
    for (unsigned i = 0; i < 1000; i++) {
        snprintf(temporary, room, "%.*s.fkv-%ld-%u.tmp", directory, path, (long)getpid(), i);
        fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY, 0666);
        if (fd >= 0 || errno != EEXIST) {
            break;
        }
    }
    return fd;
}

static fkv_status replace_file(struct fkv_ctx *ctx, const char *path, char *temporary, size_t room,
                               const char *text, size_t bytes) {
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) {
        return fkv_fail(ctx, FKV_ERR_IO, "%s: not a regular file", path);
    }
    int fd = open_beside(path, temporary, room);
    if (fd < 0) {
        return fail_io(ctx, path, "create", errno);
    }
    const char *what = "write";
    int error = write_all(fd, text, bytes);
    if (close(fd) != 0 && error == 0) {
        error = errno;
    }
    if (error == 0 && rename(temporary, path) != 0) {
        what = "rename";
        error = errno;
    }
    if (error != 0) {
        unlink(temporary);
        return fail_io(ctx, path, what, error);
    }
    return FKV_OK;
}

fkv_status fkv_profile_to_file(const struct fkv_profile_object *profile, const char *path) {
    struct fkv_ctx *ctx = profile->ctx;
    char *text;
    size_t bytes;
    fkv_status status = fkv_profile_to_json(profile, &text, &bytes);
    if (status != FKV_OK) {
        return status;
    }
    size_t room = strlen(path) + 64;
    char *temporary = fkv_heap_alloc(&ctx->heap, room);
    status = temporary ? replace_file(ctx, path, temporary, room, text, bytes)
                       : fkv_fail_memory(ctx, room, path);
    fkv_heap_free(&ctx->heap, temporary, room);
    fkv_heap_free(&ctx->heap, text, bytes + 1);
    return status;
}
