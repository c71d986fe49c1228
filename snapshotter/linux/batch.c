/* Loops over many objects of a partition in one call each: what Python does one system call at a time elsewhere.
 *
 * Optional: batch.py says how it is loaded, and whoever calls does without it where it was not built. It decides nothing. Each object
 * has an `error`: 0 if everything went the usual way; else it is to be done again, from the start, by the caller, who knows what to do
 * about it. Only what FICLONE says is told for good, as a negative errno: an error in writing the source's dirty pages is told once,
 * and the pages are clean then. No memory is allocated, nothing is kept, no descriptor stays open.
 *
 * Sources: open_by_handle_at(2), statx(2), listxattr(2), ioctl_ficlone(2), ioctl_iflags(2), <linux/fs.h>, <linux/fiemap.h>.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <pthread.h>
#include <semaphore.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define XFS_HANDLE 0x81 /* u64 inode, u32 generation */
#define INO32_HANDLE 1  /* u32 inode, u32 generation */
#define OTHER (-4096)   /* an `error` that is no errno: it moved, or is nothing that is dealt with here */
#define GROUP 32        /* files that are open together */
#define GROUPS 2        /* of them, if there are two threads */
#define NAME 48         /* of a clone: two numbers */
#define WRITEBACK (1 << 20)
#define EXTENTS 8 /* of each map; a file with more is the caller's */

/* Changes with the layouts and functions here; batch.py takes no library of another one. */
const int snapfeed_batch_version = 2;

struct looked {
    uint64_t ino;
    uint32_t gen;
    int32_t error;
    struct statx now;
};

struct extent {
    uint64_t logical, physical, length;
    uint32_t flags, unused;
};

/* `old`: the snapshot that has the clone made before, 0 for none. The counts are -1 where a map was not asked for or is too long. */
struct cloned {
    uint64_t ino;
    uint32_t gen;
    int32_t error;
    int64_t ctime_s, ctime_ns, size;
    uint64_t old;
    int32_t new_count, old_count;
    struct extent new_map[EXTENTS], old_map[EXTENTS];
};

static int open_object(int mount_fd, int type, uint64_t ino, uint32_t gen, int flags)
{
    union {
        struct file_handle head;
        unsigned char bytes[sizeof(struct file_handle) + 16];
    } handle;
    unsigned char *data = handle.bytes + offsetof(struct file_handle, f_handle);

    handle.head.handle_type = type;
    if (type == XFS_HANDLE) {
        handle.head.handle_bytes = 12;
        memcpy(data, &ino, 8);
        memcpy(data + 8, &gen, 4);
    } else if (type == INO32_HANDLE && ino <= UINT32_MAX) {
        uint32_t low = (uint32_t)ino;
        handle.head.handle_bytes = 8;
        memcpy(data, &low, 4);
        memcpy(data + 4, &gen, 4);
    } else {
        errno = EOPNOTSUPP;
        return -1;
    }
    return open_by_handle_at(mount_fd, &handle.head, flags | O_NOFOLLOW | O_CLOEXEC);
}

static int same_time(const struct statx_timestamp *a, const struct statx_timestamp *b)
{
    return a->tv_sec == b->tv_sec && a->tv_nsec == b->tv_nsec;
}

/* The metadata of one moment, of files and directories that have no extended attributes. */
static int look(int fd, struct statx *now)
{
    const unsigned int mask = STATX_BASIC_STATS | STATX_BTIME;
    const int flags = AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT;
    struct statx after;
    char path[32];

    if (statx(fd, "", flags, mask, now))
        return errno;
    if (!S_ISREG(now->stx_mode) && !S_ISDIR(now->stx_mode))
        return OTHER;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (listxattr(path, NULL, 0) != 0)
        return OTHER;
    if (statx(fd, "", flags, mask, &after))
        return errno;
    if (!same_time(&now->stx_ctime, &after.stx_ctime) || now->stx_size != after.stx_size || now->stx_nlink != after.stx_nlink)
        return OTHER;
    return 0;
}

void snapfeed_look(int mount_fd, int type, struct looked *objects, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        int fd = open_object(mount_fd, type, objects[i].ino, objects[i].gen, O_PATH);
        if (fd < 0) {
            objects[i].error = errno;
            continue;
        }
        objects[i].error = look(fd, &objects[i].now);
        close(fd);
    }
}

/* The number of extents in `map`, -1 if they do not fit or cannot be had. */
static int32_t extents(int fd, struct extent *map)
{
    union {
        struct fiemap head;
        unsigned char bytes[sizeof(struct fiemap) + (EXTENTS + 1) * sizeof(struct fiemap_extent)];
    } buffer;

    memset(&buffer.head, 0, sizeof buffer.head);
    buffer.head.fm_length = FIEMAP_MAX_OFFSET;
    buffer.head.fm_flags = FIEMAP_FLAG_SYNC;
    buffer.head.fm_extent_count = EXTENTS + 1;
    if (ioctl(fd, FS_IOC_FIEMAP, &buffer.head) || buffer.head.fm_mapped_extents > EXTENTS)
        return -1;
    for (uint32_t i = 0; i < buffer.head.fm_mapped_extents; i++) {
        const struct fiemap_extent *found = &buffer.head.fm_extents[i];
        map[i] = (struct extent){found->fe_logical, found->fe_physical, found->fe_length, found->fe_flags, 0};
    }
    return (int32_t)buffer.head.fm_mapped_extents;
}

/* An empty file for the clone, in `directory`; -1 with `error` set. */
static int make(int source, int directory, unsigned int most_extents, struct cloned *file)
{
    char name[NAME];
    struct stat now;
    struct fsxattr attributes;
    int clone;

    if (fstat(source, &now)) {
        file->error = errno;
        return -1;
    }
    file->error = OTHER;
    if (!S_ISREG(now.st_mode) || !now.st_nlink)
        return -1;
    if (!ioctl(source, FS_IOC_FSGETXATTR, &attributes) && attributes.fsx_nextents > most_extents)
        return -1;
    snprintf(name, sizeof name, "%llu.%u", (unsigned long long)file->ino, file->gen);
    clone = openat(directory, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0400);
    file->error = clone < 0 ? errno : 0;
    return clone;
}

static int fill(int source, int clone, int clones, struct cloned *file)
{
    struct stat now;
    int flags = 0;

    if (ioctl(clone, FICLONE, source))
        return -errno;
    if (!ioctl(clone, FS_IOC_GETFLAGS, &flags)) {
        flags |= FS_IMMUTABLE_FL;
        (void)ioctl(clone, FS_IOC_SETFLAGS, &flags); /* elsewhere the mode and the directory's protect it */
    }
    if (fstat(source, &now))
        return errno;
    if (now.st_ctim.tv_sec != file->ctime_s || now.st_ctim.tv_nsec != file->ctime_ns || now.st_size != file->size)
        return OTHER;
    if (file->old) {
        char path[2 * NAME];
        int before;

        file->new_count = extents(clone, file->new_map);
        snprintf(path, sizeof path, "%llu/%llu.%u", (unsigned long long)file->old, (unsigned long long)file->ino, file->gen);
        before = openat(clones, path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
        if (before >= 0) {
            file->old_count = extents(before, file->old_map);
            close(before);
        }
    }
    return 0;
}

/* Files that are open together, and the empty files made for them; -1 for those that are not dealt with. */
struct group {
    struct cloned *files;
    size_t size;
    int sources[GROUP], clones[GROUP];
};

struct work {
    int mount_fd, type, clones, directory;
    unsigned int most_extents;
    struct cloned *files;
    size_t count;
    struct group groups[GROUPS];
    sem_t empty, ready;
};

/* The dirty pages of all files of a group are on their way to the disk before the first of them is cloned. */
static void begin(struct work *work, struct group *group, size_t first)
{
    group->files = work->files + first;
    group->size = work->count - first < GROUP ? work->count - first : GROUP;
    for (size_t i = 0; i < group->size; i++) {
        struct cloned *file = &group->files[i];
        int source = open_object(work->mount_fd, work->type, file->ino, file->gen, O_RDONLY | O_NONBLOCK | O_NOATIME);

        file->new_count = file->old_count = -1;
        file->error = source < 0 ? errno : 0;
        group->sources[i] = source;
        if (source >= 0)
            (void)sync_file_range(source, 0, WRITEBACK, SYNC_FILE_RANGE_WRITE); /* errors are FICLONE's to tell */
    }
    for (size_t i = 0; i < group->size; i++)
        group->clones[i] =
            group->sources[i] < 0 ? -1 : make(group->sources[i], work->directory, work->most_extents, &group->files[i]);
}

static void end(struct work *work, struct group *group)
{
    for (size_t i = 0; i < group->size; i++) {
        struct cloned *file = &group->files[i];

        if (group->clones[i] >= 0) {
            file->error = fill(group->sources[i], group->clones[i], work->clones, file);
            close(group->clones[i]);
        }
        if (group->sources[i] >= 0)
            close(group->sources[i]);
    }
}

static void *end_all(void *argument)
{
    struct work *work = argument;
    size_t turn = 0;

    for (size_t first = 0; first < work->count; first += GROUP, turn++) {
        while (sem_wait(&work->ready))
            ;
        end(work, &work->groups[turn % GROUPS]);
        sem_post(&work->empty);
    }
    return NULL;
}

/* `clones`: the directory of all snapshots' clones; `directory`: that of this snapshot. With `threads`, a second thread fills the
 * empty files that this one makes: making them takes the directory's lock, filling them does not. Returns how many were done. */
size_t snapfeed_clone(int mount_fd, int type, int clones, int directory, unsigned int most_extents, struct cloned *files,
                      size_t count, int threads)
{
    struct work work = {.mount_fd = mount_fd, .type = type, .clones = clones, .directory = directory,
                        .most_extents = most_extents, .files = files, .count = count};
    pthread_t second;
    size_t turn = 0, done = 0;

    sem_init(&work.empty, 0, GROUPS);
    sem_init(&work.ready, 0, 0);
    threads = threads > 1 && count > GROUP && !pthread_create(&second, NULL, end_all, &work);
    for (size_t first = 0; first < count; first += GROUP, turn++) {
        struct group *group = &work.groups[turn % GROUPS];

        while (threads && sem_wait(&work.empty))
            ;
        begin(&work, group, first);
        if (threads)
            sem_post(&work.ready);
        else
            end(&work, group);
    }
    if (threads)
        pthread_join(second, NULL);
    sem_destroy(&work.empty);
    sem_destroy(&work.ready);
    for (size_t i = 0; i < count; i++)
        done += !files[i].error;
    return done;
}

/* Which of `count` names in the calling thread's working directory, each ended by NUL, have extended attributes: 0 or 1, or 2 for
 * what cannot be asked. A name that is gone has none. */
void snapfeed_have_xattrs(const char *names, uint8_t *answers, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        ssize_t size = llistxattr(names, NULL, 0);
        answers[i] = size >= 0 ? size > 0 : errno == ENOENT ? 0 : 2;
        names += strlen(names) + 1;
    }
}

/* Columns of `count` records of `stride` bytes, one after the other: for each of `columns` pairs, the `width` bytes (4 or 8) at
 * `offset` of every record. */
void snapfeed_columns(const uint8_t *records, size_t stride, size_t count, const uint32_t *columns, size_t wanted, uint8_t *out)
{
    for (size_t column = 0; column < wanted; column++) {
        const uint8_t *at = records + columns[2 * column];
        size_t width = columns[2 * column + 1];

        for (size_t i = 0; i < count; i++, at += stride, out += width)
            memcpy(out, at, width == 8 ? 8 : 4);
    }
}

/* The members of struct xfs_bulkstat (xfs_fs.h) that are used, by their place in words of 8 or 4 bytes. */
enum { RECORD_WORDS = 24, AT_INO = 0, AT_SIZE = 1, AT_BLOCKS = 2, AT_MTIME = 5, AT_CTIME = 6, AT_BTIME = 7 };
enum { AT_GEN = 16, AT_UID = 17, AT_GID = 18, AT_MTIME_NSEC = 21, AT_CTIME_NSEC = 22, AT_BTIME_NSEC = 23 };
enum { AT_BLKSIZE = 24, AT_NLINK = 28, AT_MODE = 66, ROW_WORDS = 11 }; /* AT_MODE: of 2 bytes */

/* Rows of the table `inode` out of bulkstat's records, 11 words each (xfs.py, ROW); times in nanoseconds, of 64 bits whatever
 * they are. `latest`: in whole seconds, the largest change time and the largest time of all. */
void snapfeed_rows(const uint64_t *records, size_t count, uint64_t *rows, int64_t latest[2])
{
    const uint64_t second = 1000000000;

    latest[0] = latest[1] = INT64_MIN;
    for (size_t i = 0; i < count; i++, records += RECORD_WORDS, rows += ROW_WORDS) {
        const uint32_t *halves = (const uint32_t *)records;
        int64_t times[3] = {(int64_t)records[AT_CTIME], (int64_t)records[AT_MTIME], (int64_t)records[AT_BTIME]};

        rows[0] = records[AT_INO];
        rows[1] = halves[AT_GEN];
        rows[2] = ((const uint16_t *)records)[AT_MODE];
        rows[3] = records[AT_SIZE];
        rows[4] = records[AT_BLOCKS] * halves[AT_BLKSIZE];
        rows[5] = halves[AT_UID];
        rows[6] = halves[AT_GID];
        rows[7] = (uint64_t)times[2] * second + halves[AT_BTIME_NSEC];
        rows[8] = halves[AT_NLINK];
        rows[9] = (uint64_t)times[1] * second + halves[AT_MTIME_NSEC];
        rows[10] = (uint64_t)times[0] * second + halves[AT_CTIME_NSEC];
        if (times[0] > latest[0])
            latest[0] = times[0];
        for (size_t which = 0; which < 3; which++)
            if (times[which] > latest[1])
                latest[1] = times[which];
    }
}
