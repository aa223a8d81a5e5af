// Trains sparse mixtures of linear experts on four domains of Fashion-MNIST and compares gates.
//   train_fashion --gate all
//   mpirun -np 2 train_fashion --gate topk
#include <iostream>

#include "comm/collectives.h"
#include "comm/session.h"
#include "examples/train_fashion/program.h"

int main(int argc, char** argv) {
  using namespace perseid;
  const examples::CommandLine command = examples::parse_command_line(argc, argv);
  if (!command.run) {
    // Once for all ranks, not once for each; and no rank ends before rank 0 has spoken.
    comm::run_session({}, [&command](const comm::Group& world) {
      if (world.rank() == 0) (command.exit_code == 0 ? std::cout : std::cerr) << command.text;
      comm::barrier(world);
    });
    return command.exit_code;
  }
  const examples::ProgramOptions& options = command.options;
  examples::SharedImages images;
  return comm::run_session(options.session, [&](const comm::Group& world) {
    examples::run_program(options, images, world, std::cout);
  });
}
