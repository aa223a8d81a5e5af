//   Table          every launcher alone, and mixtures: which one wins, and its numbers
//   Requested      a launcher by name ignores the others, and needs its variables
//   Device         the local rank, from the first GPU again if there are fewer
//   BadVariables   not a number, out of range, half a set: the error names variable and value
//   ReadsProcess   the real environment
#include "comm/launcher.h"

#include <cstdlib>
#include <map>

#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::detect_launcher;
using comm::Launcher;
using comm::LaunchInfo;
using Variables = std::map<std::string, std::string>;

comm::Environment environment(const Variables& variables) {
  return [variables](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    if (found == variables.end()) return std::nullopt;
    return found->second;
  };
}

Variables merged(std::initializer_list<Variables> parts) {
  Variables all;
  for (const Variables& part : parts) all.insert(part.begin(), part.end());
  return all;
}

const Variables kMpirun{{"OMPI_COMM_WORLD_RANK", "3"},
                        {"OMPI_COMM_WORLD_SIZE", "8"},
                        {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                        {"PMIX_RANK", "3"}};
const Variables kSlurm{{"SLURM_PROCID", "5"}, {"SLURM_NTASKS", "6"}, {"SLURM_LOCALID", "2"}};
const Variables kPmix{{"PMIX_RANK", "5"}};
const Variables kTorchrun{{"RANK", "1"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "1"}};
const Variables kAllocation{{"SLURM_NTASKS", "1"}, {"SLURM_PROCID", "0"}};

void expect_launch(const Variables& variables, const std::string& requested, Launcher launcher,
                   const std::string& name, int rank, int size, int local_rank) {
  const LaunchInfo info = detect_launcher(environment(variables), requested);
  EXPECT_EQ(info.launcher, launcher) << name;
  EXPECT_EQ(info.name, name);
  EXPECT_EQ(info.rank, rank) << name;
  EXPECT_EQ(info.size, size) << name;
  EXPECT_EQ(info.local_rank, local_rank) << name;
}

TEST(Launch, Table) {
  const std::string any = "auto";
  expect_launch({}, any, Launcher::kSingle, "single", 0, 1, 0);
  expect_launch(kMpirun, any, Launcher::kMpi, "mpirun", 3, 8, 1);
  expect_launch(merged({kPmix, kSlurm}), any, Launcher::kMpi, "srun (PMIx)", 5, 6, 2);
  expect_launch(kTorchrun, any, Launcher::kTorchrun, "torchrun", 1, 4, 1);
  expect_launch(kSlurm, any, Launcher::kSlurm, "srun", 5, 6, 2);
  expect_launch(kAllocation, any, Launcher::kSingle, "single", 0, 1, 0);
  expect_launch(merged({kMpirun, kSlurm, kTorchrun}), any, Launcher::kMpi, "mpirun", 3, 8, 1);
  expect_launch(merged({kPmix, kSlurm, kTorchrun}), any, Launcher::kMpi, "srun (PMIx)", 5, 6, 2);
  expect_launch(merged({kSlurm, kTorchrun}), any, Launcher::kTorchrun, "torchrun", 1, 4, 1);
  // RANK alone is a common name and says nothing.
  expect_launch({{"RANK", "3"}}, any, Launcher::kSingle, "single", 0, 1, 0);
  expect_launch({{"WORLD_SIZE", "3"}}, any, Launcher::kSingle, "single", 0, 1, 0);
  expect_launch({{"RANK", "0"}, {"WORLD_SIZE", "2"}}, any, Launcher::kTorchrun, "torchrun", 0, 2,
                0);
}

TEST(Launch, Requested) {
  const Variables all = merged({kMpirun, kSlurm, kTorchrun});
  expect_launch(all, "mpi", Launcher::kMpi, "mpirun", 3, 8, 1);
  expect_launch(all, "torchrun", Launcher::kTorchrun, "torchrun", 1, 4, 1);
  expect_launch(all, "slurm", Launcher::kSlurm, "srun", 5, 6, 2);
  expect_launch(all, "single", Launcher::kSingle, "single", 0, 1, 0);
  expect_launch(kAllocation, "slurm", Launcher::kSlurm, "srun", 0, 1, 0);
  for (const std::string requested : {"mpi", "torchrun", "slurm"}) {
    const Caught caught = catch_error([&] { detect_launcher(environment({}), requested); });
    EXPECT_EQ(caught.type, "ConfigError");
    expect_contains(caught.text, {"[detect_launcher] launcher=" + requested, "is not set"});
  }
  const Caught caught = catch_error([&] { detect_launcher(environment(all), "ssh"); });
  EXPECT_EQ(caught.type, "ConfigError");
  expect_contains(caught.text, {"launcher=ssh", "auto, mpi, slurm, torchrun or single"});
}

TEST(Launch, Device) {
  comm::LaunchInfo launch;
  launch.local_rank = 5;
  EXPECT_EQ(comm::device_of(launch, 8), 5);
  EXPECT_EQ(comm::device_of(launch, 4), 1);
  EXPECT_EQ(comm::device_of(launch, 1), 0);
  EXPECT_EQ(catch_error([&] { comm::device_of(launch, 0); }).type, "ConfigError");
}

struct BadCase {
  Variables base;
  std::string name;
  std::string value;  // "" stands for unset
};

TEST(Launch, BadVariables) {
  const BadCase cases[] = {
      {kMpirun, "OMPI_COMM_WORLD_RANK", "x"},
      {kMpirun, "OMPI_COMM_WORLD_RANK", "8"},
      {kMpirun, "OMPI_COMM_WORLD_RANK", "-1"},
      {kMpirun, "OMPI_COMM_WORLD_RANK", "1.5"},
      {kMpirun, "OMPI_COMM_WORLD_RANK", " 1"},
      {kMpirun, "OMPI_COMM_WORLD_RANK", ""},
      {kMpirun, "OMPI_COMM_WORLD_SIZE", "0"},
      {kMpirun, "OMPI_COMM_WORLD_SIZE", "99999999999"},
      {kMpirun, "OMPI_COMM_WORLD_SIZE", ""},
      {kMpirun, "OMPI_COMM_WORLD_LOCAL_RANK", "8"},
      {merged({kPmix, kSlurm}), "PMIX_RANK", "6"},
      {merged({kPmix, kSlurm}), "SLURM_NTASKS", ""},
      {kTorchrun, "RANK", "4"},
      {kTorchrun, "WORLD_SIZE", "four"},
      {kTorchrun, "LOCAL_RANK", "0x1"},
      {kSlurm, "SLURM_NTASKS", "6x"},
      {kSlurm, "SLURM_PROCID", "6"},
      {kSlurm, "SLURM_PROCID", ""},
  };
  for (const BadCase& bad : cases) {
    Variables variables = bad.base;
    variables.erase(bad.name);
    if (!bad.value.empty()) variables[bad.name] = bad.value;
    const Caught caught = catch_error([&] { detect_launcher(environment(variables)); });
    EXPECT_EQ(caught.type, "ConfigError") << bad.name << "=" << bad.value;
    const std::string value = bad.value.empty() ? "unset" : bad.value;
    expect_contains(caught.text, {"[detect_launcher] " + bad.name + "=" + value});
  }
}

TEST(Launch, ReadsProcess) {
  ::setenv("PERSEID_LAUNCH_TEST", "here", 1);
  EXPECT_EQ(comm::process_environment()("PERSEID_LAUNCH_TEST"), "here");
  ::unsetenv("PERSEID_LAUNCH_TEST");
  EXPECT_EQ(comm::process_environment()("PERSEID_LAUNCH_TEST"), std::nullopt);
}

}  // namespace
}  // namespace perseid::testing
