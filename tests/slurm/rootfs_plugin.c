/* What the tests put in pyxis' place (https://github.com/NVIDIA/pyxis): the three options of srun and sbatch that our
 * scripts use, with --container-image naming a folder that holds a root file system. A task gets an overlay over it,
 * whose changes are thrown away, and the folders of --container-mounts; then the task's root is changed to it.
 *
 *   gcc -shared -fPIC -o rootfs_plugin.so rootfs_plugin.c     (Debian: libslurm-dev)
 */
#define _GNU_SOURCE
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(rootfs, 1)

enum { IMAGE, MOUNTS, WORKDIR, OPTIONS };
static char *given[OPTIONS];
static const char scratch[] = "/run/rootfs", root[] = "/run/rootfs/root";

static int keep(int option, const char *argument, int remote) {
  (void)remote;
  free(given[option]);
  given[option] = strdup(argument);
  return 0;
}

int slurm_spank_init(spank_t context, int count, char **words) {
  static struct spank_option known[] = {
      {"container-image", "FOLDER", "root file system", 1, IMAGE, keep},
      {"container-mounts", "SRC:DST[:ro],...", "folders to bind", 1, MOUNTS, keep},
      {"container-workdir", "FOLDER", "working directory", 1, WORKDIR, keep},
  };
  (void)count, (void)words;
  if (spank_context() == S_CTX_SLURMD) return 0;
  for (int i = 0; i < OPTIONS; i++)
    if (spank_option_register(context, &known[i]) != ESPANK_SUCCESS) return -1;
  return 0;
}

static int complain(const char *what) {
  slurm_error("rootfs: %s: %m", what);
  return -1;
}

/* mkdir -p; the last part becomes an empty file where `file` is set. */
static void make_place(char *path, int file) {
  for (char *at = path + 1; *at; at++)
    if (*at == '/') {
      *at = 0;
      mkdir(path, 0755);
      *at = '/';
    }
  if (!file) {
    mkdir(path, 0755);
    return;
  }
  FILE *made = fopen(path, "a");
  if (made) fclose(made);
}

static int bind_in(const char *from, const char *to, int read_only) {
  char place[PATH_MAX];
  struct stat found;
  if (stat(from, &found)) return complain(from);
  snprintf(place, sizeof place, "%s%s", root, to);
  make_place(place, !S_ISDIR(found.st_mode));
  if (mount(from, place, NULL, MS_BIND | MS_REC, NULL)) return complain(place);
  if (read_only && mount(NULL, place, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL)) return complain(place);
  return 0;
}

int slurm_spank_task_init_privileged(spank_t context, int count, char **words) {
  static const char *own[] = {"/proc", "/sys", "/dev", "/etc/hosts", "/etc/nsswitch.conf"};
  char layers[3 * PATH_MAX];
  (void)context, (void)count, (void)words;
  if (!given[IMAGE]) return 0;
  if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) return complain("mount namespace");
  mkdir(scratch, 0755);
  if (mount("tmpfs", scratch, "tmpfs", 0, NULL)) return complain(scratch);
  mkdir("/run/rootfs/changes", 0755), mkdir("/run/rootfs/work", 0755), mkdir(root, 0755);
  snprintf(layers, sizeof layers, "lowerdir=%s,upperdir=%s/changes,workdir=%s/work", given[IMAGE], scratch, scratch);
  if (mount("overlay", root, "overlay", 0, layers)) return complain(given[IMAGE]);
  for (size_t i = 0; i < sizeof own / sizeof *own; i++)
    if (bind_in(own[i], own[i], 0)) return -1;
  char *rest = given[MOUNTS], *entry;
  while (rest && (entry = strsep(&rest, ","))) {
    char *from = strsep(&entry, ":"), *to = strsep(&entry, ":");
    if (bind_in(from, to ? to : from, entry && !strcmp(entry, "ro"))) return -1;
  }
  return chroot(root) || chdir("/") ? complain("chroot") : 0;
}

/* Between the two hooks Slurm goes to the job's directory. */
int slurm_spank_task_init(spank_t context, int count, char **words) {
  (void)context, (void)count, (void)words;
  if (given[IMAGE] && given[WORKDIR] && chdir(given[WORKDIR])) return complain(given[WORKDIR]);
  return 0;
}
