// When the tiles of AMX may be used: whatever is missing, the answer is no, and nobody is asked for nothing.
//
// tile_support COMMAND ARGUMENTS...: runs a command under a filter of system calls that refuses tiles to the process,
// as a sandbox may. tests/kernels/test_amx_permission.py uses both.
#include "cpu/amx_support.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace poc::cpu;

namespace {

int asked = 0;
bool granted() { return ++asked > 0; }
bool refused() { return ++asked < 0; }

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

// From now on arch_prctl gives this process the error EPERM when it asks for a permission; false where the system takes
// no filter.
bool refuse_permissions() {
  constexpr uint32_t kRequestPermission = 0x1023;
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, arch)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 5),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kRequestPermission, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter = {sizeof program / sizeof program[0], program};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

// Whether a process that has all else, but is refused by the system, may use tiles: exit status 0 if not, 2 where the
// system takes no filter.
int status_of_refused_process(const TileSupport& everything) {
  const pid_t child = fork();
  if (child == 0) {
    if (!refuse_permissions()) _exit(2);
    errno = 0;
    const bool usable = tiles_usable(everything);
    _exit(usable || errno != EPERM ? 1 : 0);
  }
  int status = 0;
  expect(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status), "the process that is refused lives on");
  return WEXITSTATUS(status);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    if (!refuse_permissions()) {
      std::fprintf(stderr, "this system takes no filter\n");
      return 77;
    }
    execvp(arguments[1], arguments + 1);
    std::perror(arguments[1]);
    return 127;
  }
  constexpr uint32_t kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr uint64_t kConfig = 1u << 17, kData = 1u << 18;
  expect(tiles_usable({kTiles | kInt8, true, kConfig | kData, granted}) && asked == 1,
         "with all of it they are usable");
  expect(!tiles_usable({kTiles | kInt8, true, kConfig | kData, refused}) && asked == 2, "not without permission");
  for (uint32_t features : {0u, kTiles, kInt8})
    expect(!tiles_usable({features, true, kConfig | kData, granted}), "not without the instructions");
  for (uint64_t state : {uint64_t{0}, kConfig, kData})
    expect(!tiles_usable({kTiles | kInt8, true, state, granted}), "not where their state is not saved");
  expect(!tiles_usable({kTiles | kInt8, false, kConfig | kData, granted}), "not without XSAVE");
  expect(asked == 2, "permission is asked for last");

  const int status = status_of_refused_process({kTiles | kInt8, true, kConfig | kData, ask_for_tiles});
  expect(status != 1, "not where the system refuses them");
  std::printf("a process that is refused them %s\n", status == 0 ? "goes on without" : "was not tested: no filter");

  const bool here = tiles_usable(tile_support());
  expect(here == tiles_usable(tile_support()), "asking again changes nothing");
  std::printf("this CPU %s tiles\n", here ? "lets this process use its" : "has no");
}
